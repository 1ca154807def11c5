"""``ChatRapid``: prompts, parameters, the window, what an answer says of itself."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import SMOLLM2, Everything
from langchain_core.caches import InMemoryCache
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
)
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from messages import answer, joined
from rapid_llm.config import SamplingParams
from rapid_llm.errors import ContextWindowError, InvalidParameterError
from tiny import BOS, WINDOW, tiny_decoder

from langchain_rapid import ChatRapid, GenerationTimeoutError

CHAT = [
    SystemMessage("Be brief."),
    HumanMessage("Who?"),
    AIMessage("Ann."),
    ChatMessage("Aside.", role="narrator"),
    HumanMessage([{"type": "text", "text": "And"}, "who else?"]),
]

CHAT_PROMPT = (
    "<s>[system]Be brief.\n[user]Who?\n[assistant]Ann.\n[narrator]Aside.\n"
    "[user]And\nwho else?\n[assistant]"
)


# --- prompts -----------------------------------------------------------------------------------


def test_messages_go_through_the_chat_template_with_one_bos(llm, prompts):
    llm.invoke(CHAT)
    assert prompts == [CHAT_PROMPT]
    assert prompts[0].count(BOS) == 1


def test_a_string_is_a_human_message(llm, prompts):
    llm.invoke("Hello")
    assert prompts == ["<s>[user]Hello\n[assistant]"]


def test_the_answer_is_what_the_decoder_generates_and_no_prompt(llm, decoder):
    expected = decoder.generate(
        "<s>[user]Hello\n[assistant]", sampling=SamplingParams(max_new_tokens=20)
    )
    message = llm.invoke("Hello")
    assert message.content == expected.text
    assert "Hello" not in expected.text


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (HumanMessage([{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]), "image"),
        (FunctionMessage("42", name="f"), "FunctionMessage is not supported"),
    ],
)
def test_what_cannot_be_read_is_refused(llm, message, error):
    with pytest.raises(InvalidParameterError, match=error):
        llm.invoke([HumanMessage("Look"), message])


def test_draft_messages_may_have_any_form(llm, prompts):
    draft = "<s>[user]Short\n[assistant]"
    for given in (
        "Short",
        [("human", "Short")],
        [HumanMessage("Short")],
        ChatPromptTemplate.from_template("{x}").invoke({"x": "Short"}),
    ):
        prompts.clear()
        message = llm.invoke("Long", draft_messages=given)
        assert prompts == ["<s>[user]Long\n[assistant]", draft]
        assert message.response_metadata["rapid"]["method"] == "rapid"


# --- parameters --------------------------------------------------------------------------------


def test_calls_and_bindings_override_fields(llm):
    whole = answer(llm.invoke("Hello"))
    assert len(whole) == 20
    assert answer(llm.invoke("Hello", max_tokens=5)) == whole[:5]
    assert answer(llm.bind(max_tokens=5).invoke("Hello")) == whole[:5]
    assert answer(llm.invoke("Hello", max_tokens=None)) == whole
    hot = llm.invoke("Hello", temperature=5.0, seed=1)
    assert hot.content != whole
    draft = {"draft_messages": "Hello!", "mode": "exact"}
    assert answer(llm.invoke("Hello", **draft)) == whole
    for gamma in (1, 4):
        meta = llm.invoke("Hello", **draft, gamma=gamma, max_tokens=1).response_metadata["rapid"]
        assert meta["drafted_tokens"] == 1  # no more than the answer may have
        meta = llm.invoke("Hello", **draft, gamma=gamma).response_metadata["rapid"]
        assert meta["drafted_tokens"] <= gamma * meta["rounds"]
        assert meta["method"] == "sd"
    assert answer(llm.invoke("Hello", **draft, gamma="auto")) == whole


def test_fields_may_be_configured_for_a_call(llm):
    configurable = llm.configurable_fields(max_tokens=ConfigurableField(id="length"))
    assert len(answer(configurable.invoke("Hello", {"configurable": {"length": 3}}))) == 3


def test_unknown_and_wrong_overrides_are_refused(llm):
    for wrong in ({"tempature": 1}, {"drafter": "x"}, {"top_p": 2.0}, {"timeout": -1}):
        with pytest.raises(InvalidParameterError, match=next(iter(wrong))):
            llm.invoke("Hello", **wrong)


def test_a_seed_fixes_the_answer_and_none_draws_afresh(llm):
    hot = llm.bind(temperature=3.0)
    assert hot.invoke("Hi", seed=5).content == hot.invoke("Hi", seed=5).content
    assert hot.invoke("Hi", seed=5).content != hot.invoke("Hi", seed=6).content
    assert len({answer(hot.invoke("Hi")) for _ in range(4)}) > 1  # None draws afresh


def test_what_the_models_own_configuration_says_counts(decoder):
    whole = answer(ChatRapid(decoder=decoder, max_tokens=20).invoke("Hello"))
    decoder.target.model.generation_config.repetition_penalty = 5.0
    llm = ChatRapid(decoder=decoder, max_tokens=20)
    assert answer(llm.invoke("Hello")) != whole
    assert answer(llm.invoke("Hello", repetition_penalty=1.0)) == whole


def test_stop_strings_cut_exactly(decoder, llm):
    whole = answer(llm.invoke("Hello"))
    stop = whole[7:10]
    expected = whole[: whole.index(stop)]
    for message in (
        llm.invoke("Hello", stop=[stop]),
        ChatRapid(decoder=decoder, max_tokens=20, stop=[stop]).invoke("Hello"),
        ChatRapid(decoder=decoder, max_tokens=20, stop=["unheard of"]).invoke("Hello", stop=[stop]),
        joined(list(llm.stream("Hello", stop=[stop]))),
        llm.invoke("Hello", stop=[stop], draft_messages="Hello", mode="exact"),
    ):
        assert message.content == expected
        assert message.response_metadata["finish_reason"] == "stop"
    unheeded = ChatRapid(decoder=decoder, max_tokens=20, stop=[stop])
    assert unheeded.invoke("Hello", stop=[]).content == whole


def test_one_call_may_use_another_model(llm, tiny_folder, prompts):
    message = llm.invoke("Hello", model=tiny_folder)
    assert message.response_metadata["model_name"] == tiny_folder
    assert llm.invoke("Hello").response_metadata["model_name"] == "tiny-0"
    assert llm._get_ls_params(model="x")["ls_model_name"] == "x"
    assert llm._get_ls_params()["ls_model_name"] == "tiny-0"


def test_timeout_leaves_the_model_usable(llm, decoder, slow_passes):
    with pytest.raises(GenerationTimeoutError, match=r"timeout=0\.1 s passed") as raised:
        llm.invoke("Hello", timeout=0.1, max_tokens=500)
    assert isinstance(raised.value, TimeoutError)
    assert len(slow_passes) < 100

    async def main() -> None:
        await llm.ainvoke("Hello", timeout=0.1, max_tokens=500)

    with pytest.raises(GenerationTimeoutError):
        asyncio.run(main())
    assert len(answer(llm.invoke("Hello", timeout=600))) == 20


def test_a_long_prefill_times_out_too(llm, slow_passes, monkeypatch):
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", 10)
    with pytest.raises(GenerationTimeoutError, match="after 0 of at most 20 tokens"):
        llm.invoke("x" * 1500, timeout=0.1)
    assert len(slow_passes) < 100


# --- the context window ------------------------------------------------------------------------


def test_a_prompt_too_long_says_by_how_much(llm):
    with pytest.raises(
        ContextWindowError, match=rf"2519 tokens.*{WINDOW}.*shorten the prompt by 472"
    ):
        llm.invoke("x" * 2500)


def test_truncation_keeps_both_ends_and_the_other_messages(llm, prompts):
    text = "BEGIN" + "x" * 2500 + "END?"
    message = llm.invoke([SystemMessage("Be brief."), HumanMessage(text)], truncate="middle")
    assert prompts[0].startswith("<s>[system]Be brief.\n[user]BEGIN")
    assert prompts[0].endswith("END?\n[assistant]")
    assert message.usage_metadata is not None
    assert message.usage_metadata["input_tokens"] == WINDOW - 20
    assert ChatRapid(decoder=llm.decoder, truncate="middle", max_tokens=3).invoke(text).content


# --- what an answer says of itself -------------------------------------------------------------


def test_metadata_and_usage_count_prompts_drafts_and_the_cache(llm, monkeypatch):
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", 10)
    plain = llm.invoke("Hello")
    counts = {"input_tokens": 24, "output_tokens": 20, "total_tokens": 44}
    assert plain.usage_metadata == counts | {"input_token_details": {"cache_read": 0}}
    assert plain.response_metadata["model_name"] == "tiny-0"
    assert plain.response_metadata["finish_reason"] == "length"
    rapid = plain.response_metadata["rapid"]
    assert (rapid["method"], rapid["drafted_tokens"], rapid["chunks"]) == ("lc", 0, [])
    assert rapid["cached_tokens"] == 0

    drafted = llm.invoke("Hello", draft_messages="Hello", gamma=4)
    rapid = drafted.response_metadata["rapid"]
    assert drafted.usage_metadata["input_token_details"] == {"cache_read": 23}
    assert rapid["cached_tokens"] == 23  # all but the last, whose logits are wanted
    assert (
        rapid["accepted_tokens"] == rapid["drafted_tokens"] == 16
    )  # the drafter read what the target read
    assert rapid["acceptance_ratio"] == 1.0
    assert rapid["tokens_per_round"] == 20 / rapid["rounds"] == 5.0
    assert rapid["draft_prompt_tokens"] == 24
    assert rapid["prefill_seconds"] > 0
    assert rapid["decode_seconds"] > 0
    assert rapid["draft_skipped"] is None


def test_the_stream_is_the_answer_and_its_end_has_the_metadata(llm):
    chunks = list(llm.stream("Hello"))
    assert len(chunks) == 20
    assert [c.usage_metadata for c in chunks[:-1]] == [None] * 19
    assert chunks[-1].chunk_position == "last"
    llm.decoder.clear_cache()  # or the second would find the first one's KV
    whole, message = joined(chunks), llm.invoke("Hello")
    assert whole.content == message.content
    assert whole.usage_metadata == message.usage_metadata
    assert whole.response_metadata["finish_reason"] == "length"
    assert whole.response_metadata["rapid"]["rounds"] == 20


def test_callbacks_see_every_piece_once(llm, everything):
    whole = joined(list(llm.stream("Hello", {"callbacks": [everything]})))
    pieces = [d["token"] for name, d in everything.events if name == "on_llm_new_token"]
    assert "".join(pieces) == whole.content
    everything.events.clear()
    ChatRapid(decoder=llm.decoder, streaming=True).invoke("Hi", {"callbacks": [everything]})
    assert "on_llm_new_token" in everything.names()
    everything.events.clear()
    llm.invoke("Hi", {"callbacks": [everything]}, stream=True)
    assert "on_llm_new_token" in everything.names()


def test_token_counts_are_the_models(llm, prompts):
    assert llm.get_num_tokens("Hello</s>") == 9  # a control token in a text is text
    assert llm.decoder.tokenizer.decode(llm.get_token_ids("ab")) == "ab"
    message = llm.invoke(CHAT)
    assert llm.get_num_tokens_from_messages(CHAT) == message.usage_metadata["input_tokens"]


# --- caching -----------------------------------------------------------------------------------


def test_the_draft_is_part_of_the_cache_key(decoder, prompts):
    llm = ChatRapid(decoder=decoder, max_tokens=5, cache=InMemoryCache())

    def runs(**call: Any) -> int:
        prompts.clear()
        llm.invoke("Hello", **call)
        return len(prompts)

    assert runs(draft_messages=[HumanMessage("a")]) == 2
    assert runs(draft_messages=[HumanMessage("a")]) == 0
    assert runs(draft_messages=[HumanMessage("b")]) == 2
    assert runs() == 1
    assert runs() == 0
    assert runs(max_tokens=4) == 1


def test_another_model_is_another_cache_key(prompts):
    cache = InMemoryCache()
    for seed in (0, 1):
        ChatRapid(decoder=tiny_decoder(seed), max_tokens=5, cache=cache).invoke("Hello")
    assert len(prompts) == 2


# --- one real model ----------------------------------------------------------------------------


@pytest.mark.usefixtures("smollm2")
def test_a_real_model_quotes_what_it_read():
    llm = ChatRapid(**SMOLLM2, max_tokens=40)
    fact = "The lighthouse keeper of Vell is called Orsina Dray."
    message = llm.invoke(
        [
            SystemMessage("Answer with a quotation from the text."),
            HumanMessage(
                f"{fact} She keeps bees.\n\nWhat is the lighthouse keeper of Vell called?"
            ),
        ],
        draft_messages=f"{fact}\n\nWhat is the lighthouse keeper of Vell called?",
        gamma=4,
    )
    assert "Orsina Dray" in answer(message)
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.response_metadata["rapid"]["accepted_tokens"] > 0


def test_everything_records_what_a_handler_is_told(llm):
    handler = Everything()
    llm.invoke("needle", {"callbacks": [handler]})
    assert handler.names() == ["on_chat_model_start", "on_llm_end"]
    assert handler.count("needle") == 1
