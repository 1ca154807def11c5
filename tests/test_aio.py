"""Generation under asyncio: the loop stays free, cancellation stops it, the model stays usable."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time

import pytest

from rapid_llm.aio import in_thread, iterate_in_thread
from rapid_llm.config import SamplingParams
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache.prefixes import PrefixCache
from rapid_llm.errors import InvalidParameterError

PROMPT, DRAFT = [5, 9, 31, 7, 44, 12], [31, 7]
SAMPLING = SamplingParams(max_new_tokens=30, ignore_eos=True)


@pytest.fixture
def slow_passes(monkeypatch) -> list[int]:
    """Forward passes that take 20 ms, and how many tokens each has read."""
    passes: list[int] = []
    original = ModelRunner.__call__

    def slow(runner, tokens, cache, *args):
        passes.append(len(tokens))
        time.sleep(0.02)
        return original(runner, tokens, cache, *args)

    monkeypatch.setattr(ModelRunner, "__call__", slow)
    return passes


async def collect(decoder: RapidDecoder) -> list[int]:
    chunks = decoder.astream(PROMPT, DRAFT, sampling=SAMPLING)
    return [token async for chunk in chunks for token in chunk.token_ids]


def test_streams_under_asyncio_give_the_same_tokens(decoder):
    expected = decoder.generate(PROMPT, DRAFT, sampling=SAMPLING).token_ids

    async def together():
        return await asyncio.gather(*(collect(decoder) for _ in range(3)))

    assert asyncio.run(together()) == [expected] * 3


def test_other_tasks_run_during_a_pass(decoder, slow_passes):
    async def main() -> int:
        task, ticks = asyncio.ensure_future(collect(decoder)), 0
        while not task.done():
            ticks += 1
            await asyncio.sleep(0.001)
        return ticks

    # A blocked loop would tick once a pass at most, in the gaps between them.
    assert asyncio.run(main()) > 2 * len(slow_passes)


def test_a_cancelled_task_stops_within_one_round(decoder, slow_passes):
    decoder.generate(PROMPT, DRAFT, sampling=SAMPLING)  # the costs are measured once, in no round
    slow_passes.clear()

    async def main() -> tuple[int, int]:
        task = asyncio.ensure_future(collect(decoder))
        while len(slow_passes) < 5:
            await asyncio.sleep(0.001)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        at_cancel = len(slow_passes)
        await asyncio.sleep(0.5)
        return at_cancel, len(slow_passes)

    at_cancel, afterwards = asyncio.run(main())
    assert afterwards - at_cancel <= 11  # the rest of one round: 10 drafts and a verification
    assert len(decoder.generate(PROMPT, DRAFT, sampling=SAMPLING).token_ids) == 30


def test_a_cancelled_prefill_stops_at_the_next_chunk(decoder, slow_passes, monkeypatch):
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", 10)

    async def main() -> None:
        stream = decoder.astream([5] * 400, sampling=SAMPLING)
        task = asyncio.ensure_future(anext(stream))
        while len(slow_passes) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.3)

    asyncio.run(main())
    assert len(slow_passes) < 8


def test_a_stream_may_be_left_early(decoder):
    async def main() -> int:
        stream = decoder.astream(PROMPT, DRAFT, sampling=SAMPLING)
        async for chunk in stream:
            await stream.aclose()
            return len(chunk.token_ids)
        return 0

    assert asyncio.run(main()) > 0


def test_errors_reach_an_asyncio_stream(decoder):
    async def main() -> None:
        async for _ in decoder.astream([999], sampling=SAMPLING):
            pass

    with pytest.raises(InvalidParameterError, match="999"):
        asyncio.run(main())


def test_a_stream_of_a_closed_loop_leaves_no_thread_and_no_kv_in_use(decoder):
    async def first(stream):
        await anext(stream)

    stream = decoder.astream(PROMPT, DRAFT, sampling=SAMPLING)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(first(stream))
    loop.close()
    (worker,) = (each for each in threading.enumerate() if each.name == "rapid-llm")
    assert decoder.memory.kept_kv == 0  # all of it is in use
    del stream
    gc.collect()
    worker.join(timeout=10)
    assert not worker.is_alive()
    assert decoder.memory.kept_kv > 0


def test_a_function_that_raises_stop_iteration_does_not_hang():
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(asyncio.wait_for(in_thread(lambda: next(iter(()))), timeout=10))


def test_a_closed_stream_ends_in_its_own_thread(decoder, monkeypatch):
    """Ending a generation may write a file, which must not happen on the event loop's thread."""
    ended: list[threading.Thread] = []
    original = PrefixCache._save

    def save(cache, *args):
        ended.append(threading.current_thread())
        return original(cache, *args)

    monkeypatch.setattr(PrefixCache, "_save", save)

    async def main() -> int:
        stream = decoder.astream(PROMPT, DRAFT, sampling=SAMPLING)
        await anext(stream)
        await stream.aclose()
        return len(ended)  # when the call returns, it has ended

    assert asyncio.run(main()) == 2  # the target's and the drafter's
    assert threading.main_thread() not in ended


def test_an_error_of_the_end_arrives(decoder):
    def failing(check):
        try:
            yield 1
            yield 2
        finally:
            raise ValueError("at the end")

    async def main() -> None:
        async with contextlib.aclosing(iterate_in_thread(failing)) as steps:
            assert await anext(steps) == 1

    with pytest.raises(ValueError, match="at the end"):
        asyncio.run(main())
