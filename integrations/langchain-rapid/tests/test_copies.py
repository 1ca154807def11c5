"""Copies and pickles of every public class, before and after its first use; forked processes."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration
from langchain_core.retrievers import BaseRetriever
from pydantic import BaseModel
from tiny import tiny_decoder

import langchain_rapid
from langchain_rapid import (
    ChatRapid,
    MessageOutputParser,
    RapidEmbeddings,
    RapidLLM,
    RapidStats,
    RapidStatsCallbackHandler,
)

SECRET = "hf_secret"
TEXTS = {"a": "Ann sails. Ann sings.", "b": "Bob bakes. Bob sleeps."}


class Fixed(BaseRetriever):
    """Finds the same chunk whatever it is asked."""

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return [Document("Bob bakes.", metadata={"source": "b"})]


class Length:
    """An embedding model that counts characters."""

    name = "length"

    def embed_documents(self, texts: Any) -> Any:
        import numpy as np

        return np.asarray([[len(text), 1.0] for text in texts], dtype=np.float32)

    def embed_query(self, text: str) -> Any:
        return self.embed_documents([text])[0]


def answer(llm: Any) -> str:
    said = llm.invoke("Who bakes?")
    return said if isinstance(said, str) else said.text


def parsed(parser: MessageOutputParser) -> Any:
    return parser.parse_result([ChatGeneration(message=AIMessage("x"))]).content


FIELDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "by name": lambda folder: {"model": folder, "token": SECRET},
    "of a decoder": lambda folder: {"decoder": tiny_decoder()},
    "with a retriever": lambda folder: {
        "model": folder,
        "retriever": Fixed(),
        "documents": TEXTS,
    },
}


def made(kind: Any, how: str, folder: str) -> Any:
    return kind(**FIELDS[how](folder), max_tokens=3)


CLASSES: dict[str, tuple[Callable[[str], Any], Callable[[Any], Any]]] = {
    f"{kind.__name__} {how}": (partial(made, kind, how), answer)
    for kind in (ChatRapid, RapidLLM)
    for how in FIELDS
} | {
    "RapidEmbeddings": (lambda folder: RapidEmbeddings("length"), lambda it: it.embed_query("abc")),
    "MessageOutputParser": (lambda folder: MessageOutputParser(), parsed),
    "RapidStats": (lambda folder: RapidStats(rounds=3, chunks=[{"id": "1"}]), RapidStats.as_dict),
    "RapidStatsCallbackHandler": (lambda folder: RapidStatsCallbackHandler(), lambda it: it.total),
}
WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda it: pickle.loads(pickle.dumps(it)),
    "model_copy": lambda it: it.model_copy(),
    "model_copy(deep)": lambda it: it.model_copy(deep=True),
}


@pytest.fixture(autouse=True)
def _embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rapid_llm.context.lazy.load_embedder", lambda name, device: Length())


def test_every_public_class_is_here() -> None:
    classes = {
        name
        for name in langchain_rapid.__all__
        if isinstance(getattr(langchain_rapid, name), type)
        and not issubclass(getattr(langchain_rapid, name), Exception)
    }
    assert classes == {name.split()[0] for name in CLASSES}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CLASSES)
def test_a_copy_does_what_the_first_does(name: str, way: str, used: bool, tiny_folder: str) -> None:
    make, use = CLASSES[name]
    first = make(tiny_folder)
    if way.startswith("model_copy") and not isinstance(first, BaseModel):
        pytest.skip("it is no model of pydantic's")
    if used:
        use(first)
    copied = WAYS[way](first)
    assert type(copied) is type(first)
    assert use(copied) == use(first)


@pytest.mark.parametrize("kind", [ChatRapid, RapidLLM])
def test_no_secret_is_in_a_pickle(kind: Any, tiny_folder: str) -> None:
    llm = kind(
        model=tiny_folder,
        token=SECRET,
        revision="main",
        drafter_options={"proxies": {"https": f"http://me:{SECRET}@proxy"}, "revision": "v2"},
    )
    pickled = pickle.dumps(llm)
    assert SECRET.encode() not in pickled
    opened = pickle.loads(pickled)
    assert opened.hub_options == {"revision": "main"}
    assert opened.drafter_options == {"revision": "v2"}
    assert llm.hub_options["token"] == SECRET  # the first keeps its own
    assert copy.deepcopy(llm).hub_options["token"] == SECRET


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("kind", [ChatRapid, RapidLLM])
def test_a_forked_process_loads_the_named_models_anew(kind: Any, tiny_folder: str) -> None:
    llm = kind(model=tiny_folder, max_tokens=3)
    expected = answer(llm)
    processes = get_context("fork")
    answers = processes.SimpleQueue()
    child = processes.Process(target=lambda: answers.put(answer(llm)), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child.start()
    child.join(60)
    assert child.exitcode == 0
    assert answers.get() == expected
    assert answer(llm) == expected
