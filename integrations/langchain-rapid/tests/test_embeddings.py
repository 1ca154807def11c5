"""RapidEmbeddings: rapid-llm's embedding models in LangChain."""

import asyncio
import copy
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import ValidationError
from rapid_llm.context import lazy
from rapid_llm.errors import ModelError

from langchain_rapid import RapidEmbeddings


class Lengths:
    name, batch_size = "lengths", 16

    def __init__(self, source):
        self.source, self.batches, self.threads = source, [], set()

    def embed_documents(self, texts):
        self.batches.append(len(texts))
        self.threads.add(threading.get_ident())
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)

    def embed_query(self, text):
        self.threads.add(threading.get_ident())
        return np.array([len(text), 2], dtype=np.float32)


@pytest.fixture
def loaded(monkeypatch):
    made = []

    def load(*source):
        made.append(Lengths(source))
        return made[-1]

    monkeypatch.setattr(lazy, "load_embedder", load)
    return made


def test_texts_and_questions_are_embedded_by_the_model_that_was_named(loaded):
    embeddings = RapidEmbeddings("some/model", device="cpu", batch_size=2)
    assert loaded == []
    assert embeddings.embed_documents(["a", "bc", "def"]) == [[1, 1], [2, 1], [3, 1]]
    assert embeddings.embed_query("abcd") == [4, 2]
    assert [(each.source, each.batches) for each in loaded] == [(("some/model", "cpu"), [2, 1])]
    assert embeddings.embed_documents([]) == []


async def test_the_event_loop_s_thread_embeds_nothing(loaded):
    embeddings = RapidEmbeddings("m")
    both = asyncio.gather(embeddings.aembed_documents(["a", "bc"]), embeddings.aembed_query("abc"))
    assert await both == [[[1, 1], [2, 1]], [3, 2]]
    assert len(loaded) == 1
    assert threading.get_ident() not in loaded[0].threads


def test_copies_share_the_model_and_pickles_load_it_anew(loaded):
    embeddings = RapidEmbeddings("m", device="cpu", batch_size=3)
    embeddings.embed_query("a")
    for copied in (copy.copy(embeddings), copy.deepcopy(embeddings), embeddings.model_copy()):
        assert copied.embed_query("a") == [1, 2]
    assert len(loaded) == 1
    again = pickle.loads(pickle.dumps(embeddings))
    assert len(loaded) == 1
    assert again == embeddings
    again.embed_query("a")
    assert loaded[1].source == ("m", "cpu")
    other = embeddings.model_copy(update={"model_name": "other"})
    other.embed_query("a")
    embeddings.embed_query("a")
    assert [each.source[0] for each in loaded] == ["m", "m", "other"]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValidationError, match="batch_size"):
        RapidEmbeddings(batch_size=0)
    with pytest.raises(ValidationError, match="embed_model"):
        RapidEmbeddings(embed_model="m")
    with pytest.raises(ModelError, match="no/such/folder"):
        RapidEmbeddings("no/such/folder").embed_query("a")


@pytest.mark.parametrize(
    ("installed", "name"), [(True, "all-minilm-l6-v2"), (False, "BAAI/bge-m3")]
)
def test_the_default_is_the_packaged_model_or_bge_m3(monkeypatch, installed, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object() if installed else None)
    assert RapidEmbeddings().model_name == name


def test_the_packaged_model_finds_passages():
    texts = ["The keeper kept a diary of storms.", "The ferry is named Freya.", "Newts swim."]
    store = InMemoryVectorStore.from_texts(texts, RapidEmbeddings(device="cpu"))
    assert store.similarity_search("What is the ship called?", k=1)[0].page_content == texts[1]


def test_it_is_made_without_torch():
    code = (
        "import sys; from langchain_rapid import RapidEmbeddings; RapidEmbeddings(); "
        "sys.exit('torch' in sys.modules or 'sentence_transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
