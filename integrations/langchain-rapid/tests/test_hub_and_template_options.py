"""Options for the hub and for the chat template reach them, and no secret leaves."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import rapid_llm.decoder as decoder_module
from langchain_core.caches import InMemoryCache
from langchain_core.load import dumpd
from langchain_core.messages import HumanMessage
from langchain_core.runnables import ConfigurableField
from pydantic import SecretStr, ValidationError
from rapid_llm.errors import InvalidParameterError
from rapid_llm.models import LoadedModel
from strict import THINKING, decoder_with
from tiny import tiny_model, tiny_tokenizer

from langchain_rapid import ChatRapid, RapidLLM

SECRET = "hf_secret"
KINDS = pytest.mark.parametrize("kind", [ChatRapid, RapidLLM])


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What each model was loaded with, by its name."""
    calls: dict[str, dict[str, Any]] = {}

    def load(source: Any, *, dtype: Any = "auto", device: Any = None, **hub: Any) -> LoadedModel:
        calls[str(source)] = hub
        return LoadedModel(tiny_model(), tiny_tokenizer(), str(source))

    monkeypatch.setattr(decoder_module, "load_model", load)
    monkeypatch.setattr("rapid_llm.preflight.require_model", lambda *_, **__: None)
    return calls


# --- the hub -----------------------------------------------------------------------------------


@KINDS
def test_options_reach_target_and_drafter(loaded, kind):
    options = {"token": SECRET, "revision": "v1", "cache_dir": "/c", "trust_remote_code": True}
    kind(model="org/target", drafter="org/drafter", hub_options=options, max_tokens=2).invoke("Hi")
    assert loaded["org/target"] == loaded["org/drafter"] == options


@KINDS
def test_the_drafter_may_have_options_of_its_own(loaded, kind):
    kind(
        model="org/target",
        drafter="org/drafter",
        hub_options={"revision": "v1"},
        drafter_options={"revision": "v2", "token": SecretStr(SECRET)},
        max_tokens=2,
    ).invoke("Hi")
    assert loaded["org/target"] == {"revision": "v1"}
    assert loaded["org/drafter"] == {"revision": "v2", "token": SECRET}


@KINDS
def test_the_usual_ones_may_stand_by_themselves(loaded, kind):
    for token in (SECRET, SecretStr(SECRET)):
        llm = kind(
            model="org/target",
            token=token,
            revision="v1",
            cache_dir=Path("/c"),
            hub_options={"local_files_only": True, "revision": "v0"},
            max_tokens=2,
        )
        llm.invoke("Hi")
        assert loaded["org/target"] == {
            "token": SECRET,
            "revision": "v1",
            "cache_dir": Path("/c"),
            "local_files_only": True,
        }


def test_another_model_of_a_call_has_no_revision_of_that_name(loaded):
    llm = ChatRapid(model="org/target", token=SECRET, revision="v1", max_tokens=2)
    llm.invoke("Hi", model="org/other")
    assert loaded == {"org/other": {"token": SECRET}}


def test_fields_of_their_own_are_not_hub_options():
    with pytest.raises(ValidationError, match="give it as dtype="):
        ChatRapid(hub_options={"dtype": "float32"})
    with pytest.raises(ValidationError, match="give it as drafter_options="):
        ChatRapid(hub_options={"drafter_options": {}})
    with pytest.raises(ValidationError, match="hub_options"):
        ChatRapid(hub_options=["token"], token="x")
    with pytest.raises(InvalidParameterError, match="hub_options"):
        ChatRapid().invoke("Hi", hub_options={"revision": "v1"})


@KINDS
def test_no_secret_leaves(loaded, kind, everything):
    cache = InMemoryCache()
    llm = kind(
        model="org/target",
        hub_options={"token": SECRET, "proxies": {"https": f"http://me:{SECRET}@proxy"}},
        cache=cache,
        max_tokens=2,
    )
    llm.invoke("Hi", {"callbacks": [everything]})
    list(llm.stream("Hi", {"callbacks": [everything]}))
    assert loaded["org/target"]["token"] == SECRET
    assert everything.events
    assert everything.count(SECRET) == 0
    seen = [llm, llm._identifying_params, llm.asdict(), llm.model_dump(), dumpd(llm), cache._cache]
    assert not any(SECRET in repr(what) for what in seen)
    assert SECRET not in llm.model_dump_json(exclude={"cache"})
    assert SECRET not in json.dumps(dumpd(llm), default=repr)
    own = kind(drafter="d", drafter_options={"token": SECRET, "revision": "v2"})
    assert own._identifying_params["drafter_options"] == {"revision": "v2"}
    assert not any(SECRET in repr(what) for what in (own, own._identifying_params, dumpd(own)))


@KINDS
@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"tempature": 1}, {"seed": "x"}, {"drafter_options": [SECRET]}],
)
def test_an_error_shows_no_secret(kind, wrong):
    with pytest.raises(ValidationError) as raised:
        kind(token=SECRET, **wrong)
    assert SECRET not in str(raised.value)


@KINDS
def test_a_revision_is_part_of_the_cache_key(loaded, kind):
    cache = InMemoryCache()
    for revision in ("v1", "v2", "v1"):
        kind(model="org/m", revision=revision, cache=cache, max_tokens=2).invoke("Hi")
    assert len(cache._cache) == 2
    kind(model="org/m", revision="v1", token=SECRET, cache=cache, max_tokens=2).invoke("Hi")
    assert len(cache._cache) == 2  # who fetches a model does not change it


def test_copies_and_configured_ones_keep_the_options(loaded):
    llm = ChatRapid(model="org/m", revision="v1", max_tokens=2)
    for twin in (copy.deepcopy(llm), pickle.loads(pickle.dumps(llm)), llm.model_copy()):
        assert twin.hub_options == {"revision": "v1"}
    configurable = llm.configurable_fields(max_tokens=ConfigurableField(id="length"))
    configurable.invoke("Hi", {"configurable": {"length": 3}})
    assert loaded["org/m"] == {"revision": "v1"}


# --- the chat template -------------------------------------------------------------------------

QUIET = {"enable_thinking": False}


@pytest.fixture
def thinker(prompts):
    return decoder_with(THINKING)


def test_variables_reach_the_template(thinker, prompts):
    loud, quiet = "<s>[user]Hi\n[assistant]", "<s>[user]Hi\n[assistant]()"
    llm = ChatRapid(decoder=thinker, max_tokens=2)
    llm.invoke("Hi")
    llm.invoke("Hi", chat_template_kwargs=QUIET)
    llm.bind(chat_template_kwargs=QUIET).invoke("Hi", draft_messages="Hi")
    llm.invoke("Hi", chat_template_kwargs=QUIET, truncate="middle")
    assert prompts == [loud, quiet, quiet, quiet, quiet]
    prompts.clear()
    ChatRapid(decoder=thinker, max_tokens=2, chat_template_kwargs=QUIET).invoke("Hi")
    assert prompts == [quiet]


async def test_template_variables_reach_streams_batches_and_asyncio(thinker, prompts):
    llm = ChatRapid(decoder=thinker, max_tokens=2, chat_template_kwargs=QUIET)
    list(llm.stream("Hi"))
    await llm.ainvoke("Hi")
    assert [piece async for piece in llm.astream("Hi")]
    llm.batch(["Hi"])
    assert prompts == ["<s>[user]Hi\n[assistant]()"] * 4


def test_a_calls_variables_go_before_the_fields_one_by_one(thinker, prompts):
    llm = ChatRapid(decoder=thinker, max_tokens=2, chat_template_kwargs={**QUIET, "style": "!"})
    llm.invoke("Hi", chat_template_kwargs={"enable_thinking": True})
    assert prompts == ["<s>[user]Hi\n[assistant]!"]


def test_variables_are_part_of_the_cache_key(thinker, prompts):
    cache = InMemoryCache()
    llm = ChatRapid(decoder=thinker, max_tokens=2, cache=cache)
    styled = ChatRapid(
        decoder=thinker, max_tokens=2, cache=cache, chat_template_kwargs={"style": "!"}
    )
    for _ in range(2):
        for one in (llm, styled):
            one.invoke("Hi")
            one.invoke("Hi", chat_template_kwargs={"x": 1})
    assert len(prompts) == 4
    thinker.chat_template_kwargs = QUIET
    llm.invoke("Hi")
    assert len(prompts) == 5


def test_template_variables_may_be_configured(thinker, prompts):
    llm = ChatRapid(decoder=thinker, max_tokens=2).configurable_fields(
        chat_template_kwargs=ConfigurableField(id="template")
    )
    llm.invoke([HumanMessage("Hi")], {"configurable": {"template": QUIET}})
    assert prompts == ["<s>[user]Hi\n[assistant]()"]


def test_what_is_no_mapping_is_refused(thinker):
    with pytest.raises(ValidationError, match="chat_template_kwargs"):
        ChatRapid(decoder=thinker, chat_template_kwargs=3)
    with pytest.raises(InvalidParameterError, match="chat_template_kwargs=False"):
        ChatRapid(decoder=thinker).invoke("Hi", chat_template_kwargs=False)
