"""Two replicas on Ray Serve: documents stay with their replica, and one that dies harms nobody."""

from __future__ import annotations

import os
import signal
import socket
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import installed
from serving import tiny_decoder
from test_encoding import user

from rapid_llm.config import EngineConfig, RetrievalConfig, SamplingParams, SpeculationConfig

ray = installed("ray")
from ray import serve  # noqa: E402

from rapid_llm.server.ray import application  # noqa: E402
from rapid_llm.server.settings import ServerConfig  # noqa: E402

pytestmark = pytest.mark.slow
PATH = "/v1/chat/completions"
DOCUMENTS = [f"The owl number {number} sleeps in the tree. " * 8 for number in range(6)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("models") / "tiny"
    decoder = tiny_decoder()
    decoder.target.model.save_pretrained(folder)
    decoder.tokenizer.save_pretrained(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    app = application(
        EngineConfig(model=str(folder), dtype="float32", kv_cache_dir=None),
        RetrievalConfig(),
        SamplingParams(max_new_tokens=8, seed=None),
        SpeculationConfig(gamma=3),
        ServerConfig(),
        num_replicas=2,
        ray_actor_options={"num_cpus": 0.5},
    )
    serve.run(app, route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def ask(url: str, document: str, **more: Any) -> httpx.Response:
    body = {"messages": user("Who sleeps?"), "documents": [document], "chunks": ["sleeps"], **more}
    return httpx.post(url + PATH, json=body, timeout=120)


def test_replicas_share_documents_out_and_survive_a_death(url: str) -> None:
    readers: dict[int, set[str]] = defaultdict(set)
    answers: dict[int, str] = {}
    for round_ in range(5):
        for number, document in enumerate(DOCUMENTS):
            reply = ask(url, document)
            assert reply.status_code == 200, reply.text
            readers[number].add(reply.headers["x-replica"])
            text = reply.json()["choices"][0]["message"]["content"]
            assert answers.setdefault(number, text) == text
            stats = reply.json()["rapid"]["stats"]
            assert (stats["cached_tokens"] > 0) == (round_ > 0)
    assert all(len(replicas) == 1 for replicas in readers.values())
    assert len({replica for replicas in readers.values() for replica in replicas}) == 2

    streamed = ask(url, DOCUMENTS[0], stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert ask(url, DOCUMENTS[0], temprature=1).json()["error"]["param"] == "temprature"
    assert httpx.get(url + "/v1/models", timeout=60).status_code == 200
    file = httpx.post(
        url + "/v1/files", files={"file": ("owl.txt", b"The owl.")}, timeout=60
    ).json()
    for number in range(4):  # any replica has it
        reply = ask(url, DOCUMENTS[0], documents=[{"file_id": file["id"], "id": f"owl {number}"}])
        assert reply.status_code == 200

    (dead,) = readers[0]
    os.kill(int(dead), signal.SIGKILL)
    for number, document in enumerate(DOCUMENTS):
        reply = ask(url, document)
        assert reply.status_code == 200, reply.text
        assert reply.headers["x-replica"] != dead
        assert reply.json()["choices"][0]["message"]["content"] == answers[number]
