"""Replicas from the command line: ``rapid-llm serve --replicas`` and Ray's ``serve run``."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import installed
from serving import tiny_decoder
from test_encoding import user

installed("ray")
pytestmark = pytest.mark.slow
PATH = "/v1/chat/completions"
CHAT = {"messages": user("The fox lives in the den.")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    decoder = tiny_decoder()
    decoder.target.model.save_pretrained(folder)
    decoder.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def command() -> Iterator[Any]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **environment: str) -> Any:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for each in started:
        if each.poll() is None:
            each.send_signal(signal.SIGINT)
            try:
                each.wait(30)
            except subprocess.TimeoutExpired:  # Ray's own command may miss it; so end all it began
                os.killpg(each.pid, signal.SIGKILL)
                each.wait(30)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def test_sigterm_lets_the_requests_of_replicas_finish(command: Any, model: str) -> None:
    process = command("rapid_llm", "serve", model, "--dtype", "float32", "--replicas", "2",
                      "--port", "0")  # fmt: skip
    found = None
    for line in process.stdout:
        if found := re.search(r"2 replicas run on (http://127\.0\.0\.1:\d+)$", line):
            break
    assert found is not None
    url = found[1]
    file = httpx.post(url + "/v1/files", files={"file": ("fox.txt", b"The fox.")}, timeout=60)
    assert file.status_code == 200
    body = CHAT | {"stream": True, "max_tokens": 1000, "ignore_eos": True}
    with httpx.stream("POST", url + PATH, json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason": "length"' in "".join(rest)
    assert process.wait(60) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(url + "/health")


def test_ray_runs_the_application_by_its_name(command: Any, model: str, tmp_path: Path) -> None:
    port = free_port()
    arguments = {"model": model, "dtype": "float32", "max_new_tokens": 5, "replicas": 2}
    application = {"name": "default", "route_prefix": "/", "args": arguments,
                   "import_path": "rapid_llm.server.ray:app"}  # fmt: skip
    config = tmp_path / "serve.yaml"
    config.write_text(  # JSON is YAML
        json.dumps({"http_options": {"host": "127.0.0.1", "port": port},
                    "applications": [application]})
    )  # fmt: skip
    process = command("ray.serve.scripts", "run", str(config), RAPID_LLM_API_KEY="key")
    drain = threading.Thread(target=process.stdout.read, daemon=True)
    drain.start()
    url, key = f"http://127.0.0.1:{port}", {"authorization": "Bearer key"}
    for _ in range(120):
        assert process.poll() is None
        try:
            if httpx.get(url + "/health", timeout=60).status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(1)
    assert httpx.post(url + PATH, json=CHAT, timeout=60).status_code == 401
    replicas: set[str] = set()
    for _ in range(120):  # requests reach a replica some time after it runs
        reply = httpx.post(url + PATH, json=CHAT, headers=key, timeout=60)
        assert reply.json()["usage"]["completion_tokens"] == 5
        replicas.add(reply.headers["x-replica"])
        if len(replicas) == 2:
            break
        time.sleep(0.25)
    assert len(replicas) == 2
