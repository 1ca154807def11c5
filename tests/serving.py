"""A real server on loopback, in a thread of the tests."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from zlib import crc32

import httpx
import numpy as np
import numpy.typing as npt
import uvicorn
from chat_templates import TEMPLATES, with_template
from conftest import tiny_model
from test_encoding import user

from rapid_llm.config import EngineConfig, RetrievalConfig, SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.server.app import create_app
from rapid_llm.server.settings import ServerConfig


class WordEmbedder:
    """Vectors that count words, so that a text is similar to the words it shares."""

    name = "words"

    def embed_documents(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        vectors = np.full((len(texts), 64), 0.01, dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.split():
                vectors[row, crc32(word.strip(".,?").encode()) % 64] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def embed_query(self, text: str) -> npt.NDArray[np.float32]:
        return self.embed_documents([text])[0]


CHAT = user("The fox lives in the den.")
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PLACE}}]
RETRIEVAL = RetrievalConfig(chunk_tokens=32, retrieval_tokens=64, threshold=-1)
SAMPLING = SamplingParams(max_new_tokens=16, seed=None)
SPECULATION = SpeculationConfig(gamma=3)  # auto measures anew with every test


@cache
def tiny_decoder(
    family: str = "qwen", *, max_sequences: int = EngineConfig.max_sequences, **changes: Any
) -> RapidDecoder:
    """A tiny model whose tokenizer has bytes, and a chat template with tools."""
    tokenizer = with_template(TEMPLATES[family], "<tool_call>", "</tool_call>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    settings = {"eos_token_id": end, "max_position_embeddings": 2048, **changes}
    model = tiny_model(vocab_size=len(tokenizer), **settings)
    return RapidDecoder(model, tokenizer, name="tiny", max_sequences=max_sequences)


@contextmanager
def served(
    decoder: RapidDecoder, *, embedder: Any = None, retrieval: RetrievalConfig = RETRIEVAL,
    sampling: SamplingParams = SAMPLING, **options: Any,
) -> Iterator[Server]:  # fmt: skip
    """Serve a decoder on a free port."""
    app = create_app(
        decoder,
        ServerConfig(port=0, **options),
        sampling=sampling,
        speculation=SPECULATION,
        retrieval=retrieval,
        embedder=embedder or WordEmbedder(),
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.service)
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


class Server:
    """A running server: its address, and the service behind it."""

    def __init__(self, url: str, service: Any) -> None:
        self.url, self.service = url, service

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        """Send a request; a chat has messages where none are given."""
        if path == "/v1/chat/completions":
            body.setdefault("messages", CHAT)
        return httpx.post(self.url + path, json=body, timeout=60)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Objects of a stream, which ends as OpenAI's does."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, done = [line for line in response.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a refusal, which has OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error
