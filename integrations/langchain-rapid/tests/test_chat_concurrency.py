"""Threads, tasks and batches on one model; cancelled calls and closed streams."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from messages import answer, joined
from rapid_llm.decoder import RapidDecoder

from langchain_rapid import ChatRapid


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
