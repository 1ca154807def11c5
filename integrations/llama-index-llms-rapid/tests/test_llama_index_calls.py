"""Calls as LlamaIndex sees them: callbacks, events, counts, tasks, threads, closing."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.callbacks.llama_debug import LlamaDebugHandler
from llama_index.core.callbacks.schema import CBEventType
from llama_index.core.prompts import PromptTemplate
from llm_calls import (  # noqa: F401  (fixtures)
    DRAFT,
    PROMPT,
    ROWS,
    STREAMS,
    expected_fixture,
    llm_fixture,
    responses,
    start,
    text_of,
)

from llama_index.llms.rapid import PipelineError, RapidLLM
from rapid_llm.encoding import encode_prompt
from rapid_llm.errors import ContextWindowError

# --- callbacks, events, counts -------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_token_counts_reach_the_handler(decoder, expected, row):
    counter = TokenCountingHandler()
    llm = RapidLLM(
        decoder=decoder, max_tokens=24, gamma=3, callback_manager=CallbackManager([counter])
    )
    responses(llm, row)
    assert counter.prompt_llm_token_count == expected.stats.prompt_tokens
    assert counter.completion_llm_token_count == 24
    assert counter.total_llm_token_count == expected.stats.prompt_tokens + 24
    assert len(counter.llm_token_counts) == 1


@pytest.mark.parametrize("row", ROWS)
def test_every_way_to_call_fires_its_callbacks_and_events(decoder, row, trace):
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llm = RapidLLM(decoder=decoder, max_tokens=8, callback_manager=CallbackManager([debug]))
    found = responses(llm, row)
    assert len(debug.get_event_pairs(CBEventType.LLM)) == 1
    names = [event.class_name() for event in trace.events]
    kind = "Chat" if "chat" in row else "Completion"
    progress = len(found) if "stream" in row else 0
    assert names == [
        f"LLM{kind}StartEvent",
        *[f"LLM{kind}InProgressEvent"] * progress,
        f"LLM{kind}EndEvent",
    ]
    assert trace.events[-1].response.raw["usage"]["completion_tokens"] == 8
    assert trace.span_names == [f"RapidLLM.{row}"]


@pytest.mark.parametrize("method", ["predict", "stream", "apredict", "astream"])
def test_predict_and_its_kin_have_one_span_each(llm, trace, method):
    template = PromptTemplate("{query_str}")

    def call():
        if not method.startswith("a"):
            answer = getattr(llm, method)(template, query_str=PROMPT)
            return answer if isinstance(answer, str) else "".join(answer)

        async def collect():
            answer = await getattr(llm, method)(template, query_str=PROMPT)
            return answer if isinstance(answer, str) else "".join([t async for t in answer])

        return asyncio.run(collect())

    assert call() == llm.complete(PROMPT).text
    inner = {"predict": "chat", "stream": "stream_chat"}[method.removeprefix("a")]
    prefix = "a" if method.startswith("a") else ""
    spans = [span for span in trace.span_names if span != "RapidLLM.complete"]
    assert sorted(spans) == sorted([f"RapidLLM.{method}", f"RapidLLM.{prefix}{inner}"])


def test_predict_uses_the_system_prompt(decoder, spy):
    llm = RapidLLM(decoder=decoder, max_tokens=1, system_prompt="Be brief.")
    llm.predict(PromptTemplate("Say {word}."), word="this")
    assert spy.target() == "<s><|system>Be brief.\n<|user>Say this.\n<|assistant>"


def test_an_error_in_predict_is_no_value_error(make_decoder):
    """LlamaIndex's refine mode would swallow one and answer "Empty Response"."""
    llm = RapidLLM(decoder=make_decoder(window=64), max_tokens=40)
    with pytest.raises(PipelineError, match="window") as caught:
        llm.predict(PromptTemplate("{query_str}"), query_str=PROMPT)
    assert not isinstance(caught.value, ValueError)
    assert isinstance(caught.value.__cause__, ContextWindowError)


# --- asyncio, threads, closing -------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("a")])
def test_other_tasks_run_during_a_generation(llm, slow_passes, row):
    async def generate():
        answer = await start(llm, row)
        if "stream" in row:
            async for _ in answer:
                pass

    async def main():
        task, ticks = asyncio.ensure_future(generate()), 0
        while not task.done():
            ticks += 1
            await asyncio.sleep(0.001)
        await task
        return ticks

    # A blocked loop would tick once a pass at most, in the gaps between them.
    assert asyncio.run(main()) > 2 * len(slow_passes)


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("a")])
def test_a_cancelled_task_stops_within_one_round(llm, expected, slow_passes, row):
    async def generate():
        answer = await start(llm, row, max_tokens=200)
        if "stream" in row:
            async for _ in answer:
                pass

    async def main():
        task = asyncio.ensure_future(generate())
        while len(slow_passes) < 6:
            await asyncio.sleep(0.001)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        at_cancel = len(slow_passes)
        await asyncio.sleep(0.3)
        return at_cancel

    at_cancel = asyncio.run(main())
    assert len(slow_passes) - at_cancel <= 4  # the rest of a round: 3 drafts and a verification
    assert text_of(responses(llm, row)[-1]) == expected.text


@pytest.mark.parametrize("row", STREAMS)
def test_a_closed_stream_stops_the_model(llm, expected, slow_passes, row):
    async def take_one():
        stream = await start(llm, row, max_tokens=200)
        async for _ in stream:
            break
        await stream.aclose()

    if row.startswith("a"):
        asyncio.run(take_one())
    else:
        stream = start(llm, row, max_tokens=200)
        next(stream)
        stream.close()
    assert len(slow_passes) <= 2 + 4  # two prefills and a round
    assert text_of(responses(llm, row)[-1]) == expected.text


def test_concurrent_calls_give_the_answers_that_they_give_alone(llm):
    prompts = [f"{PROMPT} {i}" for i in range(6)]
    alone = [llm.complete(p, draft_prompt=DRAFT, temperature=0.7).text for p in prompts]

    def call(prompt):
        return llm.complete(prompt, draft_prompt=DRAFT, temperature=0.7).text

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(call, prompts)) == alone

    async def tasks():
        calls = [llm.acomplete(p, draft_prompt=DRAFT, temperature=0.7) for p in prompts]
        return [response.text for response in await asyncio.gather(*calls)]

    assert asyncio.run(tasks()) == alone


def test_usage_counts_the_tokens_that_were_read(llm, spy):
    raw = llm.complete(PROMPT, draft_prompt=DRAFT).raw
    tokenizer = llm.decoder.tokenizer
    assert raw["usage"]["prompt_tokens"] == len(encode_prompt(spy.prompts[0][0], tokenizer))
    assert raw["rapid"]["draft_prompt_tokens"] == len(encode_prompt(spy.prompts[0][1], tokenizer))
