"""Copies and pickles of every public class, before and after its first use."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model, tiny_tokenizer

import rapid_llm
from rapid_llm import (
    Answer,
    ContextBuilder,
    Conversation,
    Delta,
    EngineConfig,
    GenerationRequest,
    GenerationResult,
    LoadedModel,
    RapidDecoder,
    RapidPipeline,
    RemoteDecoder,
    RetrievalConfig,
    RetrievalContext,
    SamplingParams,
    SpeculationConfig,
    Stats,
)

TEXT = "w5 w6 w7 w8 w9 w10 w11 w12"
SAMPLING = SamplingParams(max_new_tokens=3, ignore_eos=True)
BM25 = RetrievalConfig(retriever="bm25")
SECRET = "hf_secret"


def decoder() -> RapidDecoder:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return RapidDecoder(tiny_model(), tokenizer, name="tiny")


def pipeline() -> RapidPipeline:
    return RapidPipeline(decoder(), [TEXT], retrieval=BM25, sampling=SAMPLING)


def chat() -> Conversation:
    return pipeline().chat()


def tokens(result: GenerationResult) -> list[int]:
    return list(result.token_ids)


def built(builder: ContextBuilder) -> str:
    return builder.build([TEXT], "w9").text


# Of each class how to make an object, and how to use it; None for values.
CLASSES: dict[type, tuple[Callable[[], Any], Callable[[Any], Any] | None]] = {
    RapidDecoder: (decoder, lambda it: tokens(it.generate([5, 6, 7], [6], sampling=SAMPLING))),
    RapidPipeline: (pipeline, lambda it: tokens(it.ask("w9"))),
    Conversation: (chat, lambda it: it.ask("w9").context.text),
    ContextBuilder: (lambda: ContextBuilder(tiny_tokenizer(), config=BM25), built),
    Answer: (lambda: pipeline().ask("w9"), None),
    GenerationResult: (lambda: decoder().generate([5, 6], sampling=SAMPLING), None),
    Delta: (lambda: next(decoder().stream([5, 6], sampling=SAMPLING)), None),
    RetrievalContext: (lambda: pipeline().retrieve("w9"), None),
    EngineConfig: (lambda: EngineConfig(hub_options={"token": SECRET}), None),
    RetrievalConfig: (lambda: BM25, None),
    SamplingParams: (lambda: SAMPLING, None),
    SpeculationConfig: (lambda: SpeculationConfig(gamma=3), None),
    Stats: (lambda: Stats(rounds=3), None),
    GenerationRequest: (lambda: GenerationRequest([5, 6], sampling=SAMPLING), None),
    RemoteDecoder: (lambda: RemoteDecoder("http://localhost:8000/v1"), lambda it: it.base_url),
    LoadedModel: (lambda: LoadedModel(tiny_model(), tiny_tokenizer(), "tiny"), type),
}
WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda it: pickle.loads(pickle.dumps(it)),
}


def test_every_public_class_is_here() -> None:
    public = {getattr(rapid_llm, name) for name in rapid_llm.__all__}
    classes = {each for each in public if isinstance(each, type)}
    errors = {each for each in classes if issubclass(each, Exception)}
    assert classes - errors == CLASSES.keys()


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_copy_does_what_the_first_does(kind: type, way: str, used: bool) -> None:
    make, use = CLASSES[kind]
    first = make()
    if use is None:
        assert WAYS[way](first) == first
        return
    if used:
        use(first)
    copied = WAYS[way](first)
    assert isinstance(copied, kind)
    assert use(copied) == use(first)


def test_a_copied_conversation_goes_its_own_way() -> None:
    first = chat()
    first.ask("w9")
    copied = copy.deepcopy(first)
    copied.ask("w6")
    assert (len(first.messages), len(copied.messages)) == (2, 4)


def test_errors_are_pickled() -> None:
    for name in rapid_llm.__all__:
        kind = getattr(rapid_llm, name)
        if isinstance(kind, type) and issubclass(kind, Exception):
            opened = pickle.loads(pickle.dumps(kind("what is wrong")))
            assert (type(opened), str(opened)) == (kind, "what is wrong")


def test_no_secret_is_in_a_pickled_decoder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    made = RapidDecoder.from_pretrained(
        str(folder),
        str(folder),
        dtype="float32",
        device="cpu",
        token=SECRET,
        revision="main",
        drafter_options={"token": SECRET, "proxies": {"https": f"http://me:{SECRET}@proxy"}},
    )
    pickled = pickle.dumps(made)
    assert SECRET.encode() not in pickled
    opened = pickle.loads(pickled)
    use = CLASSES[RapidDecoder][1]
    assert use is not None
    assert use(opened) == use(made)
    assert opened._made_of.hub_options == {"revision": "main"}
    assert SECRET not in repr(EngineConfig(hub_options={"token": SECRET}))
