"""A client's day with a running server and the packaged model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from conftest import installed
from serving import Server, events, refused, served

from rapid_llm.config import PACKAGED_EMBEDDER, RetrievalConfig, SamplingParams

for package in ("chromadb", "sentence_transformers"):
    installed(package)

QUESTION = "Quote the definition of PROPHECY."
PATH = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "maxLength": 20}},
    "required": ["word"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    from rapid_llm import RapidDecoder

    with served(
        RapidDecoder.from_pretrained(),
        embedder=PACKAGED_EMBEDDER,
        retrieval=RetrievalConfig(chunk_tokens=64, retrieval_tokens=256),
        sampling=SamplingParams(max_new_tokens=24, seed=None),
    ) as server:
        yield server


def test_one_server_serves_a_day_of_mixed_requests(server: Server, dictionary: str) -> None:
    client = httpx.Client(base_url=server.url, timeout=120)

    def ask(question: str, **more: Any) -> httpx.Response:
        messages = [{"role": "user", "content": question}]
        return client.post(PATH, json={"messages": messages, **more})

    # Upload.
    text = dictionary[:5_000]
    files = {"file": ("dictionary.txt", text.encode())}
    file = client.post("/v1/files", files=files, data={"purpose": "user_data"}).json()
    documents = [{"file_id": file["id"]}]

    # Ask, and ask again: the second question reads only itself.
    first = ask(QUESTION, documents=documents).json()
    assert first["rapid"]["stats"]["cached_tokens"] == 0
    assert first["rapid"]["stats"]["drafted_tokens"] > 0
    chunks = first["rapid"]["chunks"]
    assert all(chunk["document_id"] == file["id"] for chunk in chunks)
    assert any("PROPHECY" in text[chunk["start"] : chunk["end"]] for chunk in chunks) == (
        "PROPHECY" in text
    )
    second = ask("What is a hermit?", documents=documents).json()
    stats = second["rapid"]["stats"]
    assert stats["cached_tokens"] > 0.7 * stats["prompt_tokens"]
    assert stats["time_to_first_token"] < first["rapid"]["stats"]["time_to_first_token"]
    usage = second["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == stats["cached_tokens"]

    # Stream: the same words.
    again = ask(QUESTION, documents=documents, stream=True)
    deltas = [part["choices"][0]["delta"] for part in events(again)]
    streamed = "".join(delta.get("content", "") for delta in deltas)
    assert streamed == ask(QUESTION, documents=documents).json()["choices"][0]["message"]["content"]

    # Cancel in the middle; the server goes on.
    body = {"messages": [{"role": "user", "content": "Tell a story."}], "stream": True,
            "max_tokens": 2000, "ignore_eos": True}  # fmt: skip
    with suppress(httpx.HTTPError), client.stream("POST", PATH, json=body) as reply:
        next(reply.iter_lines())
    assert ask("Hello!").status_code == 200

    # Tools and a schema, about the document.
    called = ask("Look up HERMIT.", documents=documents, tools=[TOOL], tool_choice="required",
                 parallel_tool_calls=False, max_tokens=60).json()["choices"][0]  # fmt: skip
    assert called["finish_reason"] == "tool_calls"
    (call,) = called["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]).keys() == {"word"}
    form = {"type": "json_schema", "json_schema": {"name": "word", "schema": SCHEMA}}
    held = ask("A word?", documents=documents, response_format=form, max_tokens=60).json()
    assert json.loads(held["choices"][0]["message"]["content"]).keys() == {"word"}

    # Bad requests.
    assert refused(ask(QUESTION, docments=documents))["param"] == "docments"
    assert refused(ask(QUESTION, documents=[{"file_id": "file-0"}]), 404)
    assert refused(ask("so " * 8_300))["code"] == "context_length_exceeded"

    # Delete; metrics of the day.
    assert client.delete(f"/v1/files/{file['id']}").json()["deleted"]
    metrics = client.get("/metrics").text
    rows = dict(r.rsplit(" ", 1) for r in metrics.splitlines() if not r.startswith("#"))
    assert float(rows["rapid_llm_accepted_tokens_total"]) > 0
    assert float(rows['rapid_llm_cached_tokens_total{tier="device"}']) > stats["cached_tokens"]
    assert float(rows['rapid_llm_requests_total{path="/v1/files",status="200"}']) == 1
    assert float(rows[f'rapid_llm_requests_total{{path="{PATH}",status="400"}}']) == 2
