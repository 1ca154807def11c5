"""``rapid-llm serve`` in a process of its own: how it starts, refuses and ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import tiny_decoder
from test_encoding import user

from rapid_llm import cli

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    decoder = tiny_decoder()
    decoder.target.model.save_pretrained(folder)
    decoder.tokenizer.save_pretrained(folder)
    return str(folder)


class Command:
    """A running server, and what it has logged."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rapid_llm", "serve", *arguments, "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.log: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._ready.wait(120), self.log
        assert self.url, self.log

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                self.url = found[1]
                self._ready.set()
        self._ready.set()


@pytest.fixture
def command() -> Iterator[Any]:
    started: list[Command] = []

    def start(*arguments: str, **environment: str) -> Command:
        started.append(Command(*arguments, **environment))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


def test_sigterm_lets_a_running_request_finish(command: Any, model: str) -> None:
    server = command(model, "--dtype", "float32", "--max-new-tokens", "7",
                     RAPID_LLM_API_KEY="key")  # fmt: skip
    headers = {"authorization": "Bearer key"}
    assert httpx.get(server.url + "/v1/models").status_code == 401
    body = {"messages": user("fox"), "stream": True, "max_tokens": 150, "ignore_eos": True}
    with httpx.stream("POST", server.url + PATH, json=body, headers=headers, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        for _ in range(2):  # a second one does not hurry it
            server.process.send_signal(signal.SIGTERM)
        rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    assert '"finish_reason": "length"' in "".join(rest)
    server.process.wait(60)
    log = "".join(server.log)
    assert f"POST {PATH!r} 200" in log
    assert "fox" not in log
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")


def test_after_the_limit_running_requests_end_with_an_error(command: Any, model: str) -> None:
    server = command(model, "--dtype", "float32", "--shutdown-seconds", "0")
    body = {"messages": user("fox"), "max_tokens": 1900, "ignore_eos": True}
    url = server.url + PATH
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.stream("POST", url, json=body | {"stream": True}, timeout=60) as reply,
    ):
        whole = pool.submit(httpx.post, url, json=body, timeout=60)
        lines = reply.iter_lines()
        next(lines)
        while "requests_running 2" not in httpx.get(server.url + "/metrics").text:
            assert not whole.done()
        server.process.send_signal(signal.SIGTERM)
        *_, last, _, done, _ = lines  # to the end, without an error of the connection
        answer = whole.result()
    assert done == "data: [DONE]"
    assert answer.status_code == 503
    assert json.loads(last.removeprefix("data: ")) == answer.json()
    assert answer.json()["error"]["code"] == "server_shutdown"
    server.process.wait(60)
    log = "".join(server.log)
    assert log.count("outlasted shutdown_seconds=0 and were ended with an error: 2") == 1
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "--port 70000"),
        (["--host", "0.0.0.0"], "RAPID_LLM_API_KEY"),
        (["--max-queue", "-1"], "--max-queue -1"),
        (["nowhere/at/all"], "nowhere/at/all"),
        (["--embedder", "nowhere/to/embed"], "embedding model 'nowhere/to/embed'"),
        (["--store", os.devnull], "cannot be opened or used"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(
    arguments: list[str], words: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAPID_LLM_API_KEY", raising=False)
    assert cli.main(["serve", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "words"), [("127.0.0.1", "in use"), ("no.such.host.example", "--host no.such")]
)
def test_a_place_that_cannot_be_listened_on_is_refused_before_a_model_is_loaded(
    host: str, words: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAPID_LLM_API_KEY", "key")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "nowhere/at/all", "--host", host, "--port", port]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "nowhere" not in told


def test_it_listens_on_ipv6_too(command: Any, model: str) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    server = command(model, "--dtype", "float32", "--host", "::1")
    assert "[::1]" in server.url
    assert httpx.get(server.url + "/v1/models").status_code == 200
    assert httpx.get(server.url + "/v1/models", headers={"host": "example.org"}).status_code == 403


def test_help_lists_every_option_once(capsys: Any) -> None:
    assert cli.main(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--host", "--api-key", "--store", "--gamma", "--max-queue", "--embedder"):
        assert shown.count(f"{option} ") == 1, option


def test_a_missing_package_is_named(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert 'pip install "rapid-llm[server]"' in capsys.readouterr().err
