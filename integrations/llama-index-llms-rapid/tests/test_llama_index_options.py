"""Every option that rapid_llm declares is a field, an option of a call and in the schema."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import pickle
import pydoc
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llama_index.llms.rapid import RapidLLM
from rapid_llm.config import (
    PACKAGED_MODEL,
    EngineConfig,
    RetrievalConfig,
    SamplingParams,
    SpeculationConfig,
)
from rapid_llm.decoder import RapidDecoder
from rapid_llm.errors import GenerationTimeoutError, InvalidParameterError
from rapid_llm.options import options_of

GENERATION = options_of(SamplingParams, SpeculationConfig)
ENGINE = options_of(EngineConfig)
RETRIEVAL = {name: options_of(RetrievalConfig)[name] for name in ("truncate", "on_empty", "order")}
DECLARED = {**GENERATION, **ENGINE, **RETRIEVAL}

ANY = (True, False, 1, 2, 0.5, 3, "text", ("text",), {"name": "text"})


def field_of(name):
    return {"max_new_tokens": "max_tokens"}.get(name, name)


def other_value(declared):
    """A value that the option takes and that is not its default."""
    taken = []
    for value in (*declared.choices, *ANY):
        with contextlib.suppress(InvalidParameterError):
            taken.append(declared.checked(value))
    return next(value for value in taken if value != declared.default)


@pytest.fixture
def given(monkeypatch) -> list[dict[str, Any]]:
    """What every generation was given beside the prompts."""
    seen: list[dict[str, Any]] = []
    original = RapidDecoder.request

    def request(self, target, draft=None, **options):
        seen.append(options)
        return original(self, target, draft)

    monkeypatch.setattr(RapidDecoder, "request", request)
    return seen


@pytest.fixture
def loaded(monkeypatch, make_decoder) -> list[EngineConfig]:
    """The configs of what was loaded; each gives a tiny model."""
    seen: list[EngineConfig] = []

    def from_config(cls, config, drafter=None):
        seen.append(config)
        return make_decoder()

    monkeypatch.setattr(RapidDecoder, "from_config", classmethod(from_config))
    return seen


def in_a_child(program):
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


# --- one list ------------------------------------------------------------------------------------


def test_every_option_is_a_field_with_its_description():
    properties = RapidLLM.model_json_schema()["properties"]
    for name, declared in DECLARED.items():
        assert properties[field_of(name)]["description"] == declared.option.help
        assert getattr(RapidLLM(), field_of(name)) == declared.default
    assert not options_of(RetrievalConfig).keys() - RETRIEVAL.keys() & properties.keys()


@pytest.mark.parametrize("name", GENERATION)
def test_a_field_reaches_the_decoder_and_a_calls_option_goes_first(decoder, given, name):
    declared = GENERATION[name]
    value = other_value(declared)
    RapidLLM(decoder=decoder, **{name: value}).complete("a")
    RapidLLM(decoder=decoder).complete("a", **{name: value})
    RapidLLM(decoder=decoder, **{name: value}).complete("a", **{name: declared.default})
    group = "sampling" if declared.group is SamplingParams else "speculation"
    values = [getattr(call[group], name) for call in given]
    assert values == [value, value, declared.default]


@pytest.mark.parametrize("name", ENGINE)
def test_an_option_of_the_models_is_there_when_they_are_loaded(loaded, name):
    value = other_value(ENGINE[name])
    assert RapidLLM(**{name: value}).decoder is not None
    # The template's variables go with each call, so that they may be set anew.
    expected = {} if name == "chat_template_kwargs" else value
    assert getattr(loaded[0], name) == expected


@pytest.mark.parametrize("name", [n for n, each in DECLARED.items() if not each.option.per_call])
def test_an_option_of_loaded_models_is_none_of_a_call_or_of_a_decoder(decoder, name):
    value = other_value(DECLARED[name])
    with pytest.raises(InvalidParameterError, match=f"unknown option '{name}'"):
        RapidLLM(decoder=decoder).complete("a", **{name: value})
    with pytest.raises(InvalidParameterError, match=f"{name} cannot be used for a loaded decoder"):
        RapidLLM(decoder=decoder, **{name: value})


def test_none_leaves_the_field_but_where_it_is_a_value(decoder, given):
    llm = RapidLLM(decoder=decoder, max_tokens=3, stop=["x"], seed=7, repetition_penalty=1.5)
    llm.complete("a", max_tokens=None, stop=None, gamma=None)
    llm.complete("a", seed=None, repetition_penalty=None)
    first, second = (call["sampling"] for call in given)
    assert (first.max_new_tokens, first.stop, first.seed) == (3, ("x",), 7)
    assert (second.seed, second.repetition_penalty) == (None, None)


def test_both_names_of_the_answers_length_are_taken(decoder, given):
    llm = RapidLLM(decoder=decoder, max_new_tokens=3)
    assert llm.max_tokens == 3
    llm.complete("a", max_new_tokens=4)
    llm.complete("a", max_tokens=5)
    assert [call["sampling"].max_new_tokens for call in given] == [4, 5]
    for make in (
        lambda: RapidLLM(decoder=decoder, max_tokens=3, max_new_tokens=4),
        lambda: llm.complete("a", max_tokens=3, max_new_tokens=4),
    ):
        with pytest.raises(InvalidParameterError, match="are one option"):
            make()


@pytest.mark.parametrize(
    ("old", "new"), [("target", "model"), ("attention", "attn_implementation")]
)
def test_an_old_name_names_the_new_one(old, new):
    with pytest.raises(InvalidParameterError, match=f"{old!r} is now {new!r}"):
        RapidLLM(**{old: "x"})


@pytest.mark.parametrize("name", DECLARED)
def test_help_describes_every_option(name):
    shown = " ".join(pydoc.plain(pydoc.render_doc(RapidLLM)).replace("|", "").split())
    assert f"{field_of(name)}: {DECLARED[name].option.help}" in shown
    assert "BeforeValidator" not in str(inspect.signature(RapidLLM))


def test_a_new_option_needs_no_edit():
    found = in_a_child("""
import json, pydoc
from dataclasses import dataclass
from typing import Annotated
from rapid_llm import config
from rapid_llm.options import Option

@dataclass(frozen=True)
class Extended(config.SpeculationConfig):
    foo: Annotated[int, Option("Number of foos.", allowed=lambda n: n >= 0)] = 1

config.SpeculationConfig = Extended
from llama_index.llms.rapid import RapidLLM

llm = RapidLLM(foo=2)
refused = ""
try:
    RapidLLM(foo=-1)
except ValueError as error:
    refused = str(error)
print(json.dumps([
    RapidLLM().foo, llm.foo, llm.to_dict()["foo"],
    llm._options({}).speculation.foo, llm._options({"foo": 3}).speculation.foo,
    "foo: Number of foos. Default: 1." in pydoc.render_doc(RapidLLM),
    RapidLLM.model_json_schema()["properties"]["foo"]["description"], refused,
]))
""")
    *values, help_, refused = json.loads(found)
    assert values == [1, 2, 2, 2, 3, True]
    assert help_ == "Number of foos."
    assert "foo=-1 is not allowed" in refused


def test_a_timeout_ends_a_call(decoder, slow_passes):
    llm = RapidLLM(decoder=decoder, max_tokens=400, timeout=0.2)
    with pytest.raises(GenerationTimeoutError, match=r"timeout=0.2"):
        llm.complete("a")
    assert len(slow_passes) < 100
    assert llm.complete("a", timeout=None, max_tokens=4).raw["usage"]["completion_tokens"] == 4


# --- which models --------------------------------------------------------------------------------


def test_without_arguments_it_is_the_packaged_model(loaded):
    for llm in (RapidLLM(), RapidLLM(None), RapidLLM(model=None, drafter=None)):
        assert llm.to_payload()["model_name"] == PACKAGED_MODEL
        assert llm.complete("a", max_tokens=2).raw["usage"]["completion_tokens"] == 2
    assert loaded == [EngineConfig()] * 3


def test_a_decoder_goes_with_no_other_models_name(decoder):
    assert RapidLLM("tiny", decoder=decoder).decoder is decoder
    with pytest.raises(InvalidParameterError, match=r"'other' and a loaded decoder of 'tiny'"):
        RapidLLM("other", decoder=decoder)


def test_a_call_may_name_another_model(loaded, decoder):
    llm = RapidLLM(decoder=decoder, max_tokens=2, hub_options={})
    llm.complete("a")
    assert loaded == []
    for _ in range(2):
        llm.complete("a", model="other")
    assert [config.model for config in loaded] == ["other"]
    assert llm.decoder is decoder


def test_telling_of_itself_loads_no_model(loaded):
    llm = RapidLLM("one", max_tokens=1)
    for _ in range(2):
        assert llm.to_payload() == {"class_name": "RapidLLM", "model_name": "one"}
        llm.complete("a", model="other")
    assert [config.model for config in loaded] == ["other"]


def test_what_says_how_to_reach_a_hub_counts_for_a_calls_own_model(loaded):
    llm = RapidLLM("one", token="t", hub_options={"variant": "fp16"})
    llm.complete("a", max_tokens=1)
    llm.complete("a", max_tokens=1, model="other")
    hub = [config.hub_options for config in loaded]
    assert hub == [{"token": "t", "variant": "fp16"}, {"token": "t"}]


def test_first_calls_at_once_load_one_decoder(monkeypatch, make_decoder):
    begun: list[EngineConfig] = []

    def from_config(cls, config, drafter=None):
        begun.append(config)
        time.sleep(0.2)  # so long that all threads have asked
        return make_decoder()

    monkeypatch.setattr(RapidDecoder, "from_config", classmethod(from_config))
    llm = RapidLLM()
    with ThreadPoolExecutor(4) as threads:
        decoders = list(threads.map(lambda _: llm.decoder, range(4)))
    assert len(begun) == 1
    assert all(decoder is decoders[0] for decoder in decoders)


def test_another_model_is_loaded_when_a_field_asks_for_it(loaded):
    llm = RapidLLM("one", max_tokens=1)
    llm.complete("a")
    copied = llm.model_copy(update={"model": "other"})
    copied.complete("a")
    llm.dtype = "float32"
    llm.complete("a")
    llm.chat_template_kwargs = {"enable_thinking": False}
    llm.complete("a")
    assert [(c.model, c.dtype) for c in loaded] == [
        ("one", "auto"),
        ("other", "auto"),
        ("one", "float32"),
    ]


# --- copies, dumps -------------------------------------------------------------------------------


@pytest.mark.parametrize("called", [False, True])
def test_copies_have_every_option(loaded, called):
    values = {
        field_of(name): other_value(each)
        for name, each in DECLARED.items()
        if name not in ("timeout", "stop", "drafting")
    }
    llm = RapidLLM(**values, documents="a text")
    if called:
        llm.complete("a", max_tokens=1)
    private = {name for name, each in DECLARED.items() if each.option.private}
    shown = {name: value for name, value in values.items() if name not in private}
    copies = {
        "deepcopy": copy.deepcopy(llm),
        "model_copy": llm.model_copy(),
        "pickle": pickle.loads(pickle.dumps(llm)),
        "dict": RapidLLM.from_dict(llm.to_dict()),
        "json": RapidLLM.from_json(llm.to_json()),
    }
    for way, made in copies.items():
        kept = shown if way in ("dict", "json") else values
        assert {name: getattr(made, name) for name in kept} == kept, way
        if way not in ("dict", "json"):
            assert made.documents == "a text"
        if way in ("deepcopy", "model_copy"):
            assert made.decoder is llm.decoder
    assert not private & llm.to_dict().keys()
    assert all(f"{name}=" not in repr(llm) for name in private)


def test_a_deep_copy_answers_with_the_same_models(decoder):
    llm = RapidLLM(decoder=decoder, max_tokens=4, chat_template_kwargs={"a": 1})
    copied = copy.deepcopy(llm)
    assert copied.decoder is decoder
    assert copied.complete("a").text == llm.complete("a").text
    copied.chat_template_kwargs["a"] = 2
    copied.max_tokens = 1
    assert (llm.chat_template_kwargs, llm.max_tokens) == ({"a": 1}, 4)


# --- a guest -------------------------------------------------------------------------------------


def test_neither_the_import_nor_an_object_imports_torch():
    found = in_a_child("""
import sys
import llama_index.llms.rapid
from llama_index.llms.rapid import RapidLLM, RapidSynthesizer
RapidSynthesizer(RapidLLM(), documents="a text")
print([name for name in ("torch", "transformers") if name in sys.modules])
""")
    assert found.strip() == "[]"


def test_a_pickle_brings_the_decoder_that_was_given(decoder: RapidDecoder) -> None:
    llm = RapidLLM(decoder=decoder, max_tokens=4)
    expected = llm.complete("w3 w4").text
    assert pickle.loads(pickle.dumps(llm)).complete("w3 w4").text == expected


def test_models_are_loaded_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(
        "llama_index.llms.rapid.loading.load", lambda engine, *, own: loaded.append(engine.model)
    )
    llm = RapidLLM("some-model")
    assert loaded == []
    assert llm.load() is llm
    assert loaded == ["some-model"]
    RapidLLM("another", preload=True)
    assert loaded == ["some-model", "another"]
    with pytest.raises(InvalidParameterError, match="top_p"):
        RapidLLM("third", top_p=2, preload=True)
    assert loaded == ["some-model", "another"]
