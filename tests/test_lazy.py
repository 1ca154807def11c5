"""A framework's embedder: loaded once and late, in batches, from any thread, copied, pickled."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rapid_llm.context import lazy
from rapid_llm.context.embedder_loading import load_embedder
from rapid_llm.context.embedding import FlagEmbedder, SentenceTransformerEmbedder
from rapid_llm.context.lazy import LazyEmbedder


class Counting:
    """Vectors of lengths; counts its calls, and fails where two overlap."""

    name = "counting"
    batch_size = 16

    def __init__(self, name: str, device: str | None) -> None:
        self.source = name, device
        self.calls: list[tuple[list[str], int]] = []
        self._busy = threading.Lock()

    def embed_documents(self, texts: Sequence[str]) -> Any:
        assert self._busy.acquire(blocking=False)
        time.sleep(0.001)
        self.calls.append((list(texts), self.batch_size))
        self._busy.release()
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)

    def embed_query(self, text: str) -> Any:
        return np.array([0, len(text)], dtype=np.float32)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Counting]:
    made: list[Counting] = []

    def load(name: str, device: str | None) -> Counting:
        made.append(Counting(name, device))
        return made[-1]

    monkeypatch.setattr(lazy, "load_embedder", load)
    return made


def test_nothing_is_loaded_before_the_first_call_and_once_then(loaded: list[Counting]) -> None:
    embedder = LazyEmbedder("some/model", "cpu")
    assert loaded == []
    assert embedder.embed_query("four") == [0.0, 4.0]
    assert embedder.embed_documents(["a", "bcd"], 8) == [[1.0, 1.0], [3.0, 1.0]]
    assert [each.source for each in loaded] == [("some/model", "cpu")]


def test_no_text_gives_no_vector(loaded: list[Counting]) -> None:
    assert LazyEmbedder("m").embed_documents([], 8) == []


def test_texts_come_in_batches_of_the_size_asked_for(loaded: list[Counting]) -> None:
    embedder = LazyEmbedder("m")
    embedder.embed_documents(list("abcde"), 2)
    embedder.embed_documents(list("abcde"), 40)
    assert loaded[0].calls == [
        (["a", "b"], 2),
        (["c", "d"], 2),
        (["e"], 2),
        (["a", "b", "c", "d", "e"], 40),
    ]


def test_lone_surrogates_are_replaced(loaded: list[Counting]) -> None:
    LazyEmbedder("m").embed_documents(["a\ud800"], 2)
    assert loaded[0].calls == [(["a\ufffd"], 2)]


def test_threads_share_one_model_and_take_turns(loaded: list[Counting]) -> None:
    embedder = LazyEmbedder("m")
    results: list[Any] = []

    def work() -> None:
        results.extend(embedder.embed_documents(["a", "b"], 1) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[[1.0, 1.0], [1.0, 1.0]]] * 20
    assert len(loaded) == 1


def test_a_copy_shares_the_model_and_a_pickle_loads_it_anew(loaded: list[Counting]) -> None:
    embedder = LazyEmbedder("m", "cpu")
    copied = copy.deepcopy(embedder)
    embedder.embed_query("a")
    copied.embed_query("a")
    assert len(loaded) == 1
    pickled = pickle.loads(pickle.dumps(embedder))
    assert len(loaded) == 1
    assert pickled.embed_query("a") == embedder.embed_query("a")
    assert [each.source for each in loaded] == [("m", "cpu")] * 2


class Recording:
    """A loaded model of either library; writes down its options."""

    max_seq_length = passage_max_length = 8
    default_prompt_name = tokenizer = None

    def __init__(self) -> None:
        self.prompts: dict[str, str] = {}
        self.sizes: list[tuple[int, int]] = []

    def encode_document(self, texts: list[str], batch_size: int, **_: Any) -> Any:
        self.sizes.append((len(texts), batch_size))
        return np.ones((len(texts), 2))

    encode_corpus = encode_document


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (SentenceTransformerEmbedder, [(70, 64)]),
        (FlagEmbedder, [(64, 65), (6, 65)]),  # a full batch would show a bar
    ],
)
def test_a_model_embeds_so_many_texts_in_one_pass(kind: Any, sizes: list[Any]) -> None:
    model = Recording()
    embedder = kind(model)
    model.sizes.clear()
    embedder.batch_size = 64
    embedder.embed_documents(["a"] * 70)
    assert model.sizes == sizes


def test_the_packaged_model_gives_the_pipeline_s_vectors() -> None:
    plain = load_embedder("all-minilm-l6-v2", "cpu")
    embedder = LazyEmbedder("all-minilm-l6-v2", "cpu")
    texts = ["A lamp stands beside the well.", "Anna waters the roses.", "x"]
    np.testing.assert_allclose(
        embedder.embed_documents(texts, 2), plain.embed_documents(texts), atol=1e-5
    )
    np.testing.assert_allclose(
        embedder.embed_query("Who waters?"), plain.embed_query("Who waters?"), atol=1e-5
    )
