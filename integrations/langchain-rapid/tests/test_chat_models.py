"""ChatRapid on tiny models: prompts, parameters, metadata, streams, asyncio, caching."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOLLM2, Everything
from langchain_core.caches import InMemoryCache
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
)
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from pydantic import ValidationError
from rapid_llm.config import SamplingParams
from rapid_llm.decoder import RapidDecoder
from rapid_llm.errors import ContextWindowError, InvalidParameterError, ModelError
from tiny import BOS, WINDOW, tiny_decoder, tiny_model, tiny_tokenizer

from langchain_rapid import ChatRapid, GenerationTimeoutError, RapidLLM

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


def answer(message: AIMessage) -> str:
    assert isinstance(message.content, str)
    return message.content


def joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


# --- construction ------------------------------------------------------------------------------


def test_neither_import_nor_construction_imports_torch():
    code = (
        "import sys; from langchain_rapid import ChatRapid, RapidLLM; ChatRapid(); RapidLLM(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_is_looked_for_when_it_is_needed():
    llm = ChatRapid(model="no-such-file.gguf")
    with pytest.raises(ModelError, match="no-such-file"):
        llm.invoke("Hello")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tempature": 1.0}, "tempature"),
        ({"temperature": -1.0}, "at least 0"),
        ({"max_tokens": 0}, "at least 1"),
        ({"timeout": 0}, "above 0"),
        ({"mode": "fast"}, "mode"),
        ({"gamma": 0}, "at least 1"),
        ({"gamma": "all"}, "gamma"),
        ({"drafter_quantization": "int3"}, "drafter_quantization"),
        ({"kv_cache_bytes": -1}, "kv_cache_bytes"),
        ({"stop": [""]}, "non-empty"),
        ({"truncate": "end"}, "truncate"),
    ],
)
def test_wrong_fields_are_refused_at_once(wrong, message):
    with pytest.raises(ValidationError, match=message):
        ChatRapid(**wrong)


def test_standard_parameters_of_hosted_models_are_accepted(tiny_folder):
    ChatRapid(api_key="none", max_retries=2, timeout=60)
    llm = ChatRapid(model=Path(tiny_folder), max_tokens=2)
    assert llm.invoke("Hello").response_metadata["model_name"] == tiny_folder


def test_traces_name_the_versions():
    for llm in (ChatRapid(), RapidLLM()):
        assert llm.metadata is not None
        assert llm.metadata["lc_versions"].keys() >= {"langchain-core", "langchain-rapid"}


def test_a_decoder_names_the_model(decoder):
    assert ChatRapid(decoder=decoder).model == "tiny-0"
    assert ChatRapid(decoder=decoder).drafter is None
    with pytest.raises(ValidationError, match="leave one of them out"):
        ChatRapid(decoder=decoder, model="other")
    with pytest.raises(ValidationError, match="type str is not allowed"):
        ChatRapid(decoder="smollm2-135m")
    two = RapidDecoder(
        tiny_model(0), tiny_tokenizer(), tiny_model(1), name="one", drafter_name="two"
    )
    assert ChatRapid(decoder=two).drafter == "two"


def test_objects_share_one_copy_of_the_weights_and_free_it(tiny_folder):
    def weights(llm: ChatRapid | RapidLLM) -> Any:
        return llm._decoder_for(llm.model).target.model

    first, second = ChatRapid(model=tiny_folder), ChatRapid(model=tiny_folder, temperature=1.0)
    text = RapidLLM(model=tiny_folder)
    assert weights(first) is weights(second) is weights(text)
    assert weights(first.model_copy(update={"seed": 3})) is weights(first)
    alive = weakref.ref(weights(first))
    del first, second, text
    gc.collect()
    assert alive() is None


def test_the_decoders_own_options_reach_it(tiny_folder, tmp_path):
    options = {"model": tiny_folder, "max_tokens": 4, "drafter_quantization": "int8"}
    prompt, kept = "abcdefgh" * 150, tmp_path / "kv"
    for cached in (False, True):  # from the folder, as nothing is kept in memory
        llm = ChatRapid(**options, kv_cache_bytes=0, kv_cache_dir=kept)
        for again in (False, True):
            rapid = llm.invoke(prompt).response_metadata["rapid"]
            assert (rapid["cached_tokens"] > 0) == (cached or again)
        assert len(list(kept.glob("*.safetensors"))) == 1
    assert llm._decoder_for(tiny_folder).draft_runner.name == f"{tiny_folder} (int8)"
    assert llm._identifying_params["drafter_quantization"] == "int8"
    without = ChatRapid(**options, kv_cache_bytes=0)
    for _ in range(2):
        assert without.invoke(prompt).response_metadata["rapid"]["cached_tokens"] == 0


def test_neither_dump_nor_repr_holds_decoder_or_documents(decoder):
    from langchain_core.load import dumps
    from langchain_core.runnables import RunnableLambda

    llm = ChatRapid(decoder=decoder, retriever=RunnableLambda(lambda _: []), documents="SECRET")
    for shown in (repr(llm), str(llm), dumps(llm), str(llm.asdict()), str(llm.model_dump())):
        assert "SECRET" not in shown
        assert "RapidDecoder" not in shown


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


# --- concurrency -------------------------------------------------------------------------------


def test_threads_get_the_answers_they_get_alone(llm):
    calls = [
        (f"Question {i}", {"temperature": 1.0, "seed": i, "draft_messages": f"Q{i}"})
        for i in range(8)
    ]
    alone = [llm.invoke(text, **options).content for text, options in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: llm.invoke(call[0], **call[1]).content, calls))
    assert together == alone
    texts = [text for text, _ in calls]
    assert [m.content for m in llm.batch(texts)] == [llm.invoke(t).content for t in texts]


async def test_batches_are_answered_at_once_and_single_calls_alone(llm, together):
    texts = [f"Question {i}" for i in range(4)]
    alone = [llm.invoke(text).content for text in texts]
    assert [llm.invoke(text).content for text in texts] == alone
    assert together == []
    assert [message.content for message in llm.batch(texts)] == alone
    assert max(together) > 1
    together.clear()
    assert [message.content for message in await llm.abatch(texts)] == alone
    assert max(together) > 1
    for config in ({"max_concurrency": 2}, {"max_concurrency": 1}):
        together.clear()
        assert [message.content for message in llm.batch(texts, config)] == alone
        assert max(together, default=0) <= config["max_concurrency"]


async def test_tasks_get_the_answers_they_get_alone(llm):
    texts = [f"Question {i}" for i in range(6)]
    alone = [llm.invoke(text).content for text in texts]
    assert [m.content for m in await llm.abatch(texts)] == alone

    async def streamed(text: str) -> Any:
        return joined([chunk async for chunk in llm.astream(text)]).content

    assert await asyncio.gather(*map(streamed, texts)) == alone


async def test_the_event_loop_runs_during_a_generation(llm, slow_passes):
    task, ticks = asyncio.ensure_future(llm.ainvoke("Hello")), 0
    while not task.done():
        ticks += 1
        await asyncio.sleep(0.001)
    # A blocked loop would tick once a pass at most, in the gaps between them.
    assert ticks > 2 * len(slow_passes)


async def test_a_model_is_loaded_once_and_not_in_the_loop(tiny_folder, monkeypatch):
    loop_thread, loading_threads = threading.get_ident(), []
    original = RapidDecoder.from_config

    def recorded(*args: Any, **options: Any) -> RapidDecoder:
        loading_threads.append(threading.get_ident())
        return original(*args, **options)

    monkeypatch.setattr(RapidDecoder, "from_config", recorded)
    llm = ChatRapid(model=tiny_folder, max_tokens=2)
    assert (await llm.ainvoke("Hello")).content == llm.invoke("Hello").content
    assert len(loading_threads) == 1
    assert loop_thread not in loading_threads


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_cancelled_task_stops_within_one_round(llm, slow_passes, streaming):
    async def consume() -> None:
        options = {"draft_messages": "Hi", "max_tokens": 500, "gamma": 4}
        if streaming:
            async for _ in llm.astream("Hello", **options):
                pass
        else:
            await llm.ainvoke("Hello", **options)

    task = asyncio.ensure_future(consume())
    while len(slow_passes) < 12:
        await asyncio.sleep(0.001)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    at_cancel = len(slow_passes)
    await asyncio.sleep(0.4)
    assert len(slow_passes) - at_cancel <= 5  # the rest of one round
    assert len(answer(llm.invoke("Hello"))) == 20


async def test_a_cancelled_prefill_stops_at_the_next_chunk(llm, slow_passes, monkeypatch):
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", 10)
    task = asyncio.ensure_future(llm.ainvoke("x" * 1500))
    while len(slow_passes) < 3:
        await asyncio.sleep(0.001)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.2)
    assert len(slow_passes) < 8


def test_a_closed_stream_stops_at_once(llm, slow_passes):
    stream = llm.stream("Hello", max_tokens=500)
    next(stream)
    stream.close()
    passes = len(slow_passes)
    assert len(answer(llm.invoke("Hello", max_tokens=3))) == 3
    assert len(slow_passes) <= passes + 4


async def test_a_closed_async_stream_stops_within_one_round(llm, slow_passes):
    stream = llm.astream("Hello", max_tokens=500)
    await anext(stream)
    await stream.aclose()
    passes = len(slow_passes)
    await asyncio.sleep(0.2)
    assert len(slow_passes) <= passes + 1


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
