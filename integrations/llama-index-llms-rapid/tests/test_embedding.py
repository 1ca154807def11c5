"""RapidEmbedding: rapid-llm's embedding models in LlamaIndex."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.schema import TextNode

from llama_index.llms.rapid import RapidEmbedding
from rapid_llm.context import lazy
from rapid_llm.errors import ModelError


class Lengths:
    name = "lengths"
    batch_size = 16

    def __init__(self, source: Any) -> None:
        self.source = source
        self.batches: list[int] = []
        self.threads: set[int] = set()

    def embed_documents(self, texts: list[str]) -> Any:
        self.batches.append(len(texts))
        self.threads.add(threading.get_ident())
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)

    def embed_query(self, text: str) -> Any:
        self.threads.add(threading.get_ident())
        return np.array([len(text), 2], dtype=np.float32)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Lengths]:
    made: list[Lengths] = []

    def load(*source: Any) -> Lengths:
        made.append(Lengths(source))
        return made[-1]

    monkeypatch.setattr(lazy, "load_embedder", load)
    return made


def test_texts_and_questions_are_embedded_by_the_model_that_was_named(
    loaded: list[Lengths],
) -> None:
    embedding = RapidEmbedding("some/model", device="cpu", embed_batch_size=2)
    assert loaded == []
    assert embedding.get_text_embedding_batch(["a", "bc", "def"]) == [[1, 1], [2, 1], [3, 1]]
    assert embedding.get_query_embedding("abcd") == [4, 2]
    assert embedding.get_text_embedding("ab") == [2, 1]
    assert [each.source for each in loaded] == [("some/model", "cpu")]
    assert loaded[0].batches == [2, 1, 1]
    nodes = embedding([TextNode(text="abc")])
    assert nodes[0].embedding == [3, 1]


def test_the_event_loop_s_thread_embeds_nothing(loaded: list[Lengths]) -> None:
    embedding = RapidEmbedding("m", embed_batch_size=2)

    async def ask() -> Any:
        return await asyncio.gather(
            embedding.aget_text_embedding_batch(["a", "bc", "def"]),
            embedding.aget_query_embedding("abc"),
            embedding.aget_text_embedding("a"),
        )

    assert asyncio.run(ask()) == [[[1, 1], [2, 1], [3, 1]], [3, 2], [1, 1]]
    assert len(loaded) == 1
    assert sorted(loaded[0].batches) == [1, 1, 2]
    assert threading.get_ident() not in loaded[0].threads


def test_copies_share_the_model_and_pickles_load_it_anew(loaded: list[Lengths]) -> None:
    embedding = RapidEmbedding("m", device="cpu", embed_batch_size=3)
    embedding.get_query_embedding("a")
    for copied in (copy.copy(embedding), copy.deepcopy(embedding), embedding.model_copy()):
        assert copied.get_query_embedding("a") == [1, 2]
    assert len(loaded) == 1
    again = pickle.loads(pickle.dumps(embedding))
    assert len(loaded) == 1
    assert (again.model_name, again.embed_batch_size, again.device) == ("m", 3, "cpu")
    again.get_query_embedding("a")
    assert loaded[1].source == ("m", "cpu")
    again.model_name = "other"
    again.get_query_embedding("a")
    assert loaded[2].source == ("other", "cpu")


def test_llama_index_stores_and_restores_it(loaded: list[Lengths]) -> None:
    embedding = RapidEmbedding("m", embed_batch_size=3)
    restored = RapidEmbedding.from_dict(embedding.to_dict())
    assert restored.to_dict() == embedding.to_dict()
    assert restored.get_query_embedding("a") == [1, 2]


def test_a_model_that_does_not_exist_is_named() -> None:
    with pytest.raises(ModelError, match="no/such/folder"):
        RapidEmbedding("no/such/folder").get_query_embedding("a")


@pytest.mark.parametrize(
    ("installed", "name"), [(True, "all-minilm-l6-v2"), (False, "BAAI/bge-m3")]
)
def test_the_default_is_the_packaged_model_or_bge_m3(
    monkeypatch: pytest.MonkeyPatch, installed: bool, name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object() if installed else None)
    assert RapidEmbedding().model_name == name


def test_the_packaged_model_finds_passages(documents: list[Document]) -> None:
    index = VectorStoreIndex.from_documents(documents, embed_model=RapidEmbedding(device="cpu"))
    (found,) = index.as_retriever(similarity_top_k=1).retrieve("When does the ferry leave?")
    assert found.node.ref_doc_id == "ferry"


def test_it_is_made_without_torch() -> None:
    code = (
        "import sys; from llama_index.llms.rapid import RapidEmbedding; RapidEmbedding(); "
        "sys.exit('torch' in sys.modules or 'sentence_transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
