"""Copies and pickles of every public class, before and after its first use; forked processes."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_decoder
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode

import llama_index.llms.rapid
from llama_index.llms.rapid import RapidEmbedding, RapidLLM, RapidSynthesizer

SECRET = "hf_secret"
TEXTS = {"a": "Ann sails. Ann sings.", "b": "Bob bakes. Bob sleeps."}
NODES = [
    NodeWithScore(
        node=TextNode(
            text="Bob bakes.",
            relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id="b")},
        ),
        score=0.5,
    )
]


class Length:
    """An embedding model that counts characters."""

    name = "length"

    def embed_documents(self, texts: Any) -> Any:
        return np.asarray([[len(text), 1.0] for text in texts], dtype=np.float32)

    def embed_query(self, text: str) -> Any:
        return self.embed_documents([text])[0]


def by_name(folder: str, **fields: Any) -> RapidLLM:
    return RapidLLM(folder, dtype="float32", device="cpu", max_tokens=3, token=SECRET, **fields)


def of_a_decoder(folder: str) -> RapidLLM:
    return RapidLLM(decoder=tiny_decoder(), max_tokens=3)


def completed(llm: RapidLLM) -> str:
    return llm.complete("Who bakes?").text


def asked(synthesizer: RapidSynthesizer) -> tuple[str, list[str]]:
    response = synthesizer.synthesize("Who bakes?", NODES)
    return str(response), response.metadata["rapid"]["document_ids"]


CLASSES: dict[str, tuple[Callable[[str], Any], Callable[[Any], Any]]] = {
    "RapidLLM by name": (by_name, completed),
    "RapidLLM with documents": (lambda folder: by_name(folder, documents=TEXTS), completed),
    "RapidLLM of a decoder": (of_a_decoder, completed),
    "RapidSynthesizer by name": (
        lambda folder: RapidSynthesizer(by_name(folder), documents=TEXTS),
        asked,
    ),
    "RapidSynthesizer of a decoder": (
        lambda folder: RapidSynthesizer(of_a_decoder(folder), documents=TEXTS),
        asked,
    ),
    "RapidEmbedding": (
        lambda folder: RapidEmbedding("length"),
        lambda it: it.get_query_embedding("abc"),
    ),
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("tiny")
    decoder = tiny_decoder()
    decoder.target.model.save_pretrained(path)
    decoder.tokenizer.save_pretrained(path)
    return str(path)


def test_every_public_class_is_here() -> None:
    public = {
        name: getattr(llama_index.llms.rapid, name) for name in llama_index.llms.rapid.__all__
    }
    classes = {
        name
        for name, value in public.items()
        if isinstance(value, type) and not issubclass(value, Exception)
    }
    assert classes == {name.split()[0] for name in CLASSES}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CLASSES)
def test_a_copy_does_what_the_first_does(name: str, way: str, used: bool, folder: str) -> None:
    make, use = CLASSES[name]
    first = make(folder)
    if way.startswith("model_copy") and not isinstance(first, BaseModel):
        pytest.skip("it is no model of pydantic's")
    if used:
        use(first)
    copied = WAYS[way](first)
    assert type(copied) is type(first)
    assert use(copied) == use(first)


def test_no_secret_is_in_a_pickle(folder: str) -> None:
    proxies = {"https": f"http://me:{SECRET}@proxy"}
    llm = by_name(folder, revision="main", drafter_options={"proxies": proxies, "revision": "v2"})
    for pickled in (pickle.dumps(llm), pickle.dumps(RapidSynthesizer(llm, documents=TEXTS))):
        assert SECRET.encode() not in pickled
    opened = pickle.loads(pickle.dumps(llm))
    assert opened.hub_options == {"revision": "main"}
    assert opened.drafter_options == {"revision": "v2"}
    assert llm.hub_options["token"] == SECRET  # the first keeps its own
    assert copy.deepcopy(llm).hub_options["token"] == SECRET


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_loads_the_named_models_anew(folder: str) -> None:
    llm = by_name(folder)
    expected = completed(llm)
    processes = get_context("fork")
    answers = processes.SimpleQueue()
    child = processes.Process(target=lambda: answers.put(completed(llm)), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child.start()
    child.join(60)
    assert child.exitcode == 0
    assert answers.get() == expected
    assert completed(llm) == expected
