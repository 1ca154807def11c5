"""Replicas on Ray Serve: documents stay with theirs, one that dies harms nobody, load adds some."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import installed
from serving import tiny_decoder
from starlette.requests import Request
from test_encoding import user

from rapid_llm.config import EngineConfig, RetrievalConfig, SamplingParams, SpeculationConfig

ray = installed("ray")
from ray import serve  # noqa: E402

from rapid_llm.server.ray import application, session_of  # noqa: E402
from rapid_llm.server.settings import ServerConfig  # noqa: E402

pytestmark = pytest.mark.slow
PATH = "/v1/chat/completions"
LONG = {"max_tokens": 1500, "ignore_eos": True, "seed": 1}
DOCUMENTS = [f"The owl number {number} sleeps in the tree. " * 8 for number in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("models") / "tiny"
    decoder = tiny_decoder()
    decoder.target.model.save_pretrained(folder)
    decoder.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a cluster on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def run(model: str, name: str, **deployment: Any) -> None:
    """Run replicas of a tiny model as an application, under the path of its name."""
    web = application(
        EngineConfig(model=model, dtype="float32", kv_cache_dir=None),
        RetrievalConfig(),
        SamplingParams(max_new_tokens=8, seed=None),
        SpeculationConfig(gamma=3),
        ServerConfig(),
        ray_actor_options={"num_cpus": 0.4},
        **deployment,
    )
    serve.run(web, name=name, route_prefix=f"/{name}")


@pytest.fixture(scope="module")
def url(cluster: str, model: str) -> str:
    run(model, "two", num_replicas=2)
    return f"{cluster}/two"


def replicas(name: str) -> int:
    """Number of an application's replicas that run."""
    states = serve.status().applications[name].deployments["Replica"].replica_states
    return {str(getattr(s, "value", s)): n for s, n in states.items()}.get("RUNNING", 0)


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that happens within two minutes."""
    for _ in range(240):
        if holds():
            return
        time.sleep(0.5)
    raise AssertionError("it did not happen within two minutes")


def running(url: str, document: str) -> float:
    """Number of requests that run in the replica of a document."""
    body = json.dumps({"documents": [document]}).encode()
    session = session_of(Request({"type": "http", "headers": []}), body)
    assert session is not None
    text = httpx.get(url + "/metrics", headers={"x-session-id": session}, timeout=60).text
    (line,) = (line for line in text.splitlines() if line.startswith("rapid_llm_requests_running "))
    return float(line.split()[1])


def asked(document: str) -> dict[str, Any]:
    return {"messages": user("Who sleeps?"), "documents": [document], "chunks": ["sleeps"]}


def ask(url: str, document: str, **more: Any) -> httpx.Response:
    body = asked(document) | more
    return httpx.post(url + PATH, json=body, timeout=120)


def read_by_each(url: str) -> list[str]:
    """Six documents that were read once: three of them by each of two replicas."""
    found: dict[str, list[str]] = {}
    numbers = count()

    def both_answer() -> bool:  # requests reach a replica some time after it runs
        reply = ask(url, f"The fox number {next(numbers)} sleeps.")
        found.setdefault(reply.headers["x-replica"], [])
        return len(found) == 2

    until(both_answer)
    for number in range(60):
        document = f"The owl number {number} sleeps in the tree. " * 8
        reply = ask(url, document)
        assert reply.json()["rapid"]["stats"]["cached_tokens"] == 0
        found[reply.headers["x-replica"]].append(document)
        if min(map(len, found.values())) >= 3:
            break
    return [document for documents in found.values() for document in documents[:3]]


def test_replicas_share_documents_out_and_survive_a_death(url: str) -> None:
    documents = read_by_each(url)
    readers: dict[int, set[str]] = defaultdict(set)
    answers: dict[int, str] = {}
    for _ in range(5):
        for number, document in enumerate(documents):
            reply = ask(url, document)
            assert reply.status_code == 200, reply.text
            readers[number].add(reply.headers["x-replica"])
            text = reply.json()["choices"][0]["message"]["content"]
            assert answers.setdefault(number, text) == text
            assert reply.json()["rapid"]["stats"]["cached_tokens"] > 0
    assert len(readers) == 6
    assert all(len(replicas) == 1 for replicas in readers.values())

    streamed = ask(url, documents[0], stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert ask(url, documents[0], temprature=1).json()["error"]["param"] == "temprature"
    assert httpx.get(url + "/v1/models", timeout=60).status_code == 200
    file = httpx.post(
        url + "/v1/files", files={"file": ("owl.txt", b"The owl.")}, timeout=60
    ).json()
    for number in range(4):  # any replica has it
        reply = ask(url, documents[0], documents=[{"file_id": file["id"], "id": f"owl {number}"}])
        assert reply.status_code == 200

    (dead,) = readers[0]
    os.kill(int(dead), signal.SIGKILL)
    for number, document in enumerate(documents):
        reply = ask(url, document)
        assert reply.status_code == 200, reply.text
        assert reply.headers["x-replica"] != dead
        assert reply.json()["choices"][0]["message"]["content"] == answers[number]


def test_a_replica_that_dies_within_a_stream_ends_it_with_an_error(url: str) -> None:
    until(lambda: replicas("two") == 2)
    body = asked(DOCUMENTS[0]) | LONG | {"stream": True}
    with httpx.stream("POST", url + PATH, json=body, timeout=120) as reply:
        lines = reply.iter_lines()
        assert "delta" in next(lines)
        os.kill(int(reply.headers["x-replica"]), signal.SIGKILL)
        *_, died, done = [line for line in lines if line]
    assert done == "data: [DONE]"
    assert json.loads(died.removeprefix("data: "))["error"]["code"] == "replica_died"
    assert ask(url, DOCUMENTS[0]).status_code == 200


def test_a_whole_answer_whose_replica_dies_is_given_by_another(url: str) -> None:
    until(lambda: replicas("two") == 2)
    whole = ask(url, DOCUMENTS[0], **LONG)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, url, DOCUMENTS[0], **LONG)
        until(lambda: running(url, DOCUMENTS[0]) == 1)
        os.kill(int(whole.headers["x-replica"]), signal.SIGKILL)
        reply = answer.result()
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-replica"] != whole.headers["x-replica"]
    assert reply.json()["choices"] == whole.json()["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_replica(url: str, stream: bool) -> None:
    until(lambda: replicas("two") == 2)
    body = asked(DOCUMENTS[0]) | LONG | {"stream": stream}
    with (
        suppress(httpx.ReadTimeout),
        httpx.stream("POST", url + PATH, json=body, timeout=60 if stream else 0.5) as reply,
    ):
        assert stream, reply.read()
        next(reply.iter_lines())
    until(lambda: running(url, DOCUMENTS[0]) == 0)


def test_load_starts_another_replica_and_its_end_stops_one(cluster: str, model: str) -> None:
    serve.delete("two")
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1,
               "upscale_delay_s": 1, "downscale_delay_s": 2, "look_back_period_s": 2,
               "metrics_interval_s": 0.5}  # fmt: skip
    run(model, "scaled", autoscaling_config=scaling)
    url, ended = f"{cluster}/scaled", threading.Event()
    assert replicas("scaled") == 1

    numbers, reached = count(), set[str]()

    def client() -> None:  # of new documents, as all of a few may belong to one replica
        while not ended.is_set():
            document = f"The fox number {next(numbers)} sleeps."
            reply = ask(url, document, max_tokens=100, ignore_eos=True)
            assert reply.status_code == 200, reply.text
            reached.add(reply.headers["x-replica"])

    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(client) for _ in range(6)]
        try:
            until(lambda: len(reached) == 2)
        finally:
            ended.set()
        for each in clients:
            each.result()
    until(lambda: replicas("scaled") == 1)
    assert ask(url, DOCUMENTS[0]).status_code == 200
