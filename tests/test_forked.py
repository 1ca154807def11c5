"""A forked process answers with what it loads itself, and says what it cannot use."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import threads, tiny_model, tiny_tokenizer

from rapid_llm import forked
from rapid_llm.config import RetrievalConfig, SamplingParams
from rapid_llm.context import ContextBuilder
from rapid_llm.context.lazy import LazyEmbedder
from rapid_llm.decoder import RapidDecoder
from rapid_llm.errors import ForkedProcessError
from rapid_llm.forked import ProcessLock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

SAMPLING = SamplingParams(max_new_tokens=4, ignore_eos=True)
SECONDS = 60


def in_child(act: Callable[[], Any]) -> Any:
    """What a function returns or raises in a forked child, which may not wait for ever."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    outcome: Any = act()
                except BaseException as error:
                    outcome = error
            told = [str(each.message) for each in caught if "forked" in str(each.message)]
            os.write(write, pickle.dumps((outcome, told)))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        sent = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert sent, f"the child ended with {status} (-14: it waited for ever)"
    return pickle.loads(sent)


@pytest.fixture
def busy_threads() -> Iterator[None]:
    """PyTorch's threads have computed in the thread that forks, so that OpenMP knows them."""
    with threads(2):
        torch.ones(500, 500) @ torch.ones(500, 500)
        torch.rand(1_000_000).exp().sum()
        yield


def test_what_the_parent_loaded_is_refused_with_the_remedy(busy_threads: None) -> None:
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer(), name="tiny")
    stream = decoder.stream([5, 6, 7], sampling=SAMPLING)
    expected = [token for delta in stream for token in delta.token_ids]
    for act in (
        lambda: decoder.generate([5, 6, 7], sampling=SAMPLING),
        lambda: decoder.log_likelihood([5, 6, 7], "w8"),
        lambda: decoder.keep_only([5, 6, 7]),
    ):
        error, _ = in_child(act)
        assert isinstance(error, ForkedProcessError)
        assert all(word in str(error) for word in ("tiny", str(os.getpid()), "'spawn'"))
    assert list(decoder.generate([5, 6, 7], sampling=SAMPLING).token_ids) == expected


@pytest.mark.parametrize("held", [False, True])
def test_what_the_child_loads_answers_as_in_the_parent(held: bool, busy_threads: None) -> None:
    model = tiny_model()

    def answer() -> list[int]:
        decoder = RapidDecoder(model, tiny_tokenizer())
        prompt = [3 + i % 60 for i in range(300)]  # long enough that PyTorch divides the work
        return list(decoder.generate(prompt, [5, 6], sampling=SAMPLING).token_ids)

    expected = answer()
    if not held:
        tokens, told = in_child(answer)
    else:
        from rapid_llm.engine.model_runner import ModelRunner

        runner, taken, go = ModelRunner(model, "tiny"), threading.Event(), threading.Event()

        def hold() -> None:  # a pass of another thread, which the child does not have
            with runner.lock:
                taken.set()
                go.wait(SECONDS)

        thread = threading.Thread(target=hold)
        thread.start()
        taken.wait(SECONDS)
        tokens, told = in_child(answer)
        go.set()
        thread.join()
    assert tokens == expected
    assert len(told) == 1
    assert "one thread" in told[0]


class Words:
    """An embedder that needs no model."""

    name, threshold = "words", None

    def embed_documents(self, texts: Any) -> Any:
        return np.asarray([self.embed_query(text) for text in texts], dtype=np.float32)

    def embed_query(self, text: str) -> Any:
        vector = np.ones(64, dtype=np.float32)
        for word in text.split():
            vector[int(word[1:])] += 10
        return vector / np.linalg.norm(vector)


def test_a_builder_by_words_serves_the_child() -> None:
    builder = ContextBuilder(tiny_tokenizer(), config=RetrievalConfig(retriever="bm25"))
    texts = ["w5 w6 w7", "w8 w9 w10"]
    expected = builder.build(texts, "w9").text
    found, _ = in_child(lambda: builder.build(texts, "w9").text)
    assert found == expected == "w8 w9 w10"


def test_an_embedder_is_loaded_anew_by_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str, device: str | None) -> Words:
        loaded.append(name)
        return Words()

    monkeypatch.setattr("rapid_llm.context.lazy.load_embedder", load)
    embedder = LazyEmbedder("words")
    expected = embedder.embed_query("w5")

    def ask() -> tuple[bool, int]:
        return embedder.embed_query("w5") == expected, len(loaded)

    assert in_child(ask)[0] == (True, 2)
    assert ask() == (True, 1)


def test_a_lock_that_another_thread_held_is_free_in_the_child() -> None:
    lock, taken, go = ProcessLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            go.wait(SECONDS)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(SECONDS)

    def take() -> str:
        with lock:
            return "taken"

    assert in_child(take)[0] == "taken"
    go.set()
    thread.join()
    with lock:  # held by the thread that forks: its own in the child too
        assert in_child(take)[0] == "taken"


def test_a_child_of_a_child_is_another_process() -> None:
    owner = forked.Owner("it")
    inner, _ = in_child(lambda: (owner.here, in_child(lambda: owner.here)[0]))
    assert inner == (False, False)
    assert owner.here
