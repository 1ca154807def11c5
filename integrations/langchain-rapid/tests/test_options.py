"""Options are declared in rapid-llm alone: fields, arguments of calls, keys and help follow."""

from __future__ import annotations

import asyncio
import copy
import pickle
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.prompts import PromptTemplate
from langchain_core.retrievers import BaseRetriever
from pydantic import ValidationError
from rapid_llm.config import EngineConfig, RetrievalConfig, SamplingParams, SpeculationConfig
from rapid_llm.errors import InvalidParameterError
from rapid_llm.options import options_of
from rapid_llm.stats import Stats

from langchain_rapid import ChatRapid, RapidLLM, create_rapid_documents_chain
from langchain_rapid.grounding import confidence_of

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
KINDS = pytest.mark.parametrize("kind", [ChatRapid, RapidLLM])
OPTIONS = {
    {"max_new_tokens": "max_tokens"}.get(name, name): declared
    for name, declared in options_of(
        SamplingParams, SpeculationConfig, EngineConfig, RetrievalConfig
    ).items()
    if declared.group is not RetrievalConfig or name in ("truncate", "on_empty")
}


@pytest.fixture
def given(decoder, monkeypatch) -> list[dict[str, Any]]:
    """What each call gave to the decoder, beside prompts."""
    calls: list[dict[str, Any]] = []
    original = decoder.stream

    def recorded(*prompts: Any, **options: Any) -> Any:
        calls.append(options)
        return original(*prompts, **options)

    monkeypatch.setattr(decoder, "stream", recorded)
    return calls


# --- fields ------------------------------------------------------------------------------------


@KINDS
def test_every_option_is_a_field_with_its_default_and_description(kind):
    schema, shown = kind.model_json_schema()["properties"], " ".join(pydoc.plain(
        pydoc.render_doc(kind)).replace("|", "").split())  # fmt: skip
    llm = kind()
    for name, declared in OPTIONS.items():
        assert getattr(llm, name) == (None if name == "seed" else declared.default)
        assert schema[name]["description"] == declared.option.help
        assert f"{name}: {declared.option.help}" in shown
    assert schema["decoder"]["description"] in shown
    others = options_of(RetrievalConfig).keys() - {"truncate", "on_empty", "order", "retriever"}
    assert not others & kind.model_fields.keys()


@KINDS
@pytest.mark.parametrize(
    ("old", "new"), [("target", "model"), ("attention", "attn_implementation")]
)
def test_an_old_name_names_the_new_one(kind, old, new):
    with pytest.raises(ValueError, match=f"{old!r} is now {new!r}"):
        kind(**{old: "x"})


def test_a_new_option_needs_no_other_edit():
    code = """
import pydoc
from dataclasses import dataclass
from typing import Annotated
import rapid_llm.config as config
from rapid_llm.options import Option

@dataclass(frozen=True)
class WithFoo(config.SpeculationConfig):
    foo: Annotated[int, Option("Number of foos.", "at least 1", lambda n: n >= 1)] = 3

config.SpeculationConfig = WithFoo
from langchain_rapid import ChatRapid, RapidLLM
from rapid_llm.errors import InvalidParameterError
from tiny import tiny_decoder

decoder = tiny_decoder()
original, seen = decoder.stream, []
decoder.stream = lambda *p, **o: seen.append(o["speculation"].foo) or original(*p, **o)
for kind in (ChatRapid, RapidLLM):
    llm = kind(decoder=decoder, max_tokens=1, foo=4)
    llm.invoke("Hi")
    llm.invoke("Hi", foo=5)
    assert kind.model_json_schema()["properties"]["foo"]["description"] == "Number of foos."
    assert "foo: Number of foos. Default: 3." in pydoc.render_doc(kind)
    assert llm._identifying_params["foo"] == 4
    for wrong in (lambda: kind(foo=0), lambda: llm.invoke("Hi", foo=0)):
        try:
            wrong()
        except ValueError as error:
            assert "foo=0 is not allowed" in str(error)
        else:
            raise AssertionError
assert seen == [4, 5] * 2
"""
    command = [sys.executable, "-c", code]
    ran = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_options_of_loading_reach_the_models(tiny_folder):
    llm = ChatRapid(model=tiny_folder, attn_implementation="eager", max_tokens=1)
    llm.invoke("Hi")
    assert llm._decoder_for(tiny_folder).target.attn_implementation == "eager"
    other = llm.model_copy(update={"attn_implementation": "sdpa"})
    assert other._decoder_for(tiny_folder).target.attn_implementation == "sdpa"
    assert llm._decoder_for(tiny_folder).target.attn_implementation == "eager"


@KINDS
def test_both_names_of_a_length_are_taken_and_not_both_at_once(kind, decoder, given):
    llm = kind(decoder=decoder, max_new_tokens=2)
    assert llm.max_tokens == 2
    llm.invoke("Hi")
    llm.invoke("Hi", max_tokens=1)
    llm.invoke("Hi", max_new_tokens=3)
    assert [call["sampling"].max_new_tokens for call in given] == [2, 1, 3]
    with pytest.raises(ValidationError, match="one option"):
        kind(max_tokens=2, max_new_tokens=3)
    with pytest.raises(InvalidParameterError, match="one option"):
        llm.invoke("Hi", max_tokens=2, max_new_tokens=3)
    assert llm._get_ls_params(max_new_tokens=3)["ls_max_tokens"] == 3


@KINDS
def test_copies_and_pickles_are_equal_also_after_a_call(kind, tiny_folder):
    llm = kind(model=tiny_folder, max_tokens=1, lookup=False, hub_options={"revision": "v1"})
    llm.invoke("Hi")
    for twin in (copy.deepcopy(llm), pickle.loads(pickle.dumps(llm)), llm.model_copy()):
        assert twin == llm
        assert (twin.lookup, twin.hub_options) == (False, {"revision": "v1"})
    assert len(pickle.dumps(llm)) < 10_000  # without weights
    weights = llm._decoder_for(tiny_folder).target.model
    assert copy.deepcopy(llm)._decoder_for(tiny_folder).target.model is weights


# --- calls -------------------------------------------------------------------------------------


@KINDS
def test_a_call_overrides_every_option_that_belongs_to_no_model(kind, decoder, given):
    others: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.5,
        "max_tokens": 2, "stop": ["~"], "seed": 7, "ignore_eos": True, "timeout": 500.0,
        "constraint": {"regex": "a+"},
        "gamma": 2, "eta": 3.0, "dynamic_eta": True, "alpha": 0.3, "mode": "exact",
        "drafting": "rest", "lookup": False, "min_confidence": 0.5,
        "model": decoder.target.name, "chat_template_kwargs": {"x": 1},
        "truncate": "middle", "on_empty": "read_all",
    }  # fmt: skip
    assert others.keys() == {n for n, each in OPTIONS.items() if each.option.per_call}
    llm = kind(decoder=decoder)
    llm.invoke("Hi", **others)
    sampling, speculation = given[0]["sampling"], given[0]["speculation"]
    for name in options_of(SamplingParams):
        expected = others["max_tokens" if name == "max_new_tokens" else name]
        assert getattr(sampling, name) == (("~",) if name == "stop" else expected)
    for name in options_of(SpeculationConfig):
        assert getattr(speculation, name) == others[name]
    for name in OPTIONS.keys() - others.keys():
        with pytest.raises(InvalidParameterError, match=f"{name}= .* when the model is constr"):
            llm.invoke("Hi", **{name: "x"})
    with pytest.raises(InvalidParameterError, match="embedder= is not taken; a call takes alpha"):
        llm.invoke("Hi", embedder="x")


def test_none_leaves_a_field_as_it_is_but_for_the_seed(decoder, given):
    fields = {"seed": 3, "timeout": 500.0, "top_p": 0.5, "repetition_penalty": 2.0, "stop": ["~"]}
    llm = ChatRapid(decoder=decoder, max_tokens=1, **fields)
    llm.invoke("Hi", **dict.fromkeys(fields))
    sampling = given[0]["sampling"]
    assert (sampling.seed, sampling.timeout, sampling.top_p) == (None, 500.0, 0.5)
    assert (sampling.repetition_penalty, sampling.stop) == (2.0, ("~",))


@KINDS
def test_all_that_can_change_an_answer_is_in_the_cache_key(kind, decoder, given):
    cache = InMemoryCache()

    def runs(field: dict[str, Any], **call: Any) -> int:
        before = len(given)
        kind(decoder=decoder, **({"max_tokens": 1} | field), cache=cache).invoke("Hi", **call)
        return len(given) - before

    assert runs({}) == 1
    for field in ({"lookup": False}, {"drafting": "rest"}, {"stop": ["~"]}, {"max_tokens": 2}):
        assert [runs(field), runs(field)] == [1, 0]
    # A call's None says nothing, and must not hide that the fields differ.
    assert [runs({"top_k": k}, top_k=None) for k in (3, 4, 3)] == [1, 1, 0]
    assert [runs({}, confidence=c) for c in (0.25, 0.75, 0.25)] == [1, 1, 0]


# --- confidence --------------------------------------------------------------------------------


def scored(key: str, *scores: Any) -> list[Document]:
    return [
        Document(f"Passage {i}.", metadata={} if score is None else {key: score})
        for i, score in enumerate(scores)
    ]


@pytest.mark.parametrize(
    ("chunks", "confidence"),
    [
        (scored("relevance_score", 0.3, 0.4), 0.5),
        (scored("score", None, 0.4), 0.5),
        (scored("score", -1, 0.1), 0.0),
        (scored("score", 0.9), 1.0),
        (scored("score", None, None), 1.0),
        (scored("score", "0.3", True), 1.0),  # no numbers
        (scored("score", 12.5, 0.3), 1.0),  # of another scale, as BM25's
        (scored("score", float("nan")), 1.0),
        (scored("distance", 0.3), 1.0),
        ([Document("x", metadata={"score": 0.3, "relevance_score": 0.4})], 0.5),
    ],
)
def test_the_confidence_is_of_the_chunks_best_score(chunks, confidence):
    assert confidence_of(chunks) == pytest.approx(confidence)


class Finds(BaseRetriever):
    chunks: list[Document]

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        return self.chunks


@KINDS
def test_the_retrievals_confidence_reaches_the_decoder(kind, decoder, given):
    chunks = scored("score", 0.4)
    text = "".join(chunk.page_content for chunk in chunks)
    options: dict[str, Any] = {"decoder": decoder, "max_tokens": 1, "dynamic_eta": True}
    prompt = PromptTemplate.from_template("{context} {input}")
    chain = create_rapid_documents_chain(kind(**options), prompt, documents=text)
    chain.invoke({"context": chunks, "input": "Who?"})
    llm = kind(**options, retriever=Finds(chunks=chunks), documents=text)
    llm.invoke("Who?")
    list(llm.stream("Who?"))
    asyncio.run(llm.ainvoke("Who?"))
    assert [call["confidence"] for call in given] == [pytest.approx(0.5)] * 4
    given.clear()
    llm.invoke("Who?", confidence=0.25)
    by_hand = {"draft_messages" if kind is ChatRapid else "draft_prompt": "Who?"}
    kind(**options).invoke("Who?", confidence=0.75, **by_hand)
    kind(**options).invoke("Who?", confidence=None, **by_hand)
    assert [call["confidence"] for call in given] == [0.25, 0.75, 1.0]
    with pytest.raises(InvalidParameterError, match="confidence=2 "):
        kind(**options).invoke("Who?", confidence=2, **by_hand)


@KINDS
def test_a_call_says_what_is_read_where_nothing_was_retrieved(kind, decoder, prompts):
    llm = kind(decoder=decoder, max_tokens=1, retriever=Finds(chunks=[]), documents="A text.")
    llm.invoke("Who?")
    llm.invoke("Who?", on_empty="read_all")
    asyncio.run(llm.ainvoke("Who?", on_empty="read_all"))
    assert ["A text." in prompt for prompt in prompts] == [False, True, True]
    with pytest.raises(InvalidParameterError, match="on_empty='all'"):
        llm.invoke("Who?", on_empty="all")


# --- what is shown -----------------------------------------------------------------------------


def test_metadata_show_all_counts(decoder):
    message = ChatRapid(decoder=decoder, max_tokens=2).invoke("Hi")
    rapid = message.response_metadata["rapid"]
    assert rapid.keys() == Stats().as_dict().keys() | {"chunks"}
    assert (rapid["completion_tokens"], rapid["max_new_tokens"]) == (2, 2)


def rows() -> dict[str, str]:
    """Of each name in a table of the README the cell beside it."""
    found: dict[str, str] = {}
    for names, beside in re.findall(r"^\| (`.*?`) \| (.*?) \|", README, re.MULTILINE):
        named = re.findall(r"`(\w+)`", names)
        values = beside.split(", ") if len(named) > 1 else [beside]
        found |= dict(zip(named, (*values, *values * len(named)), strict=False))
    return found


def test_the_readme_names_every_field_with_its_default_and_every_count():
    table = rows()
    for llm in (ChatRapid(), RapidLLM()):
        for name, field in type(llm).model_fields.items():
            if field.description:
                value = getattr(llm, name)
                shown = f"{value:g}" if type(value) is float else str(value)
                assert table[name].strip("`") == shown, name
    assert Stats().as_dict().keys() <= table.keys()


@pytest.mark.parametrize("kind", [ChatRapid, RapidLLM])
def test_models_are_loaded_when_asked_for(kind, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "rapid_llm.decoder.RapidDecoder.from_config", lambda config: loaded.append(config.model)
    )
    llm = kind(model="some-model")
    assert loaded == []
    assert llm.load() is llm
    assert loaded == ["some-model"]
    kind(model="another", preload=True)
    assert loaded == ["some-model", "another"]
    with pytest.raises(ValueError, match="top_p"):
        kind(model="third", top_p=2, preload=True)
    assert loaded == ["some-model", "another"]


@KINDS
@pytest.mark.parametrize(
    ("option", "value"),
    [("dtype", "float32"), ("drafter", "other"), ("kv_cache_bytes", 0), ("token", "hf_secret")],
)
def test_what_a_loaded_decoder_cannot_follow_is_refused(kind, decoder, option, value):
    with pytest.raises(ValidationError, match="cannot be used for a loaded decoder") as error:
        kind(decoder=decoder, **{option: value})
    assert "hf_secret" not in str(error.value)


@KINDS
def test_none_is_the_default_where_it_is_no_value(kind, decoder, given):
    """As ``temperature=None`` of LangChain's other models, and of the LlamaIndex wheel."""
    llm = kind(decoder=decoder, temperature=None, top_p=None, max_tokens=None, mode=None, stop=None)
    assert (llm.temperature, llm.top_p, llm.max_tokens, llm.mode) == (0.0, 1.0, 256, "paper")
    assert kind(max_new_tokens=None, max_tokens=3).max_tokens == 3
    llm.invoke("Hi", temperature=None, max_tokens=2)
    assert given[0]["sampling"].temperature == 0.0
    assert kind(seed=None, drafter_quantization=None).drafter_quantization is None
