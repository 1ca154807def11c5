"""Blocking work for asyncio, in threads of its own, and cancelled within one step."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar, cast

T = TypeVar("T")

_END = object()


class _AbandonedError(Exception):
    """The asynchronous iterator was closed or cancelled. Callers never see this error."""


class _Worker:
    """A thread that runs one function after another.

    Not one of asyncio's default executor: generations that wait for a model would take them all,
    and nothing else in the program could use it.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="rapid-llm", daemon=True).start()

    def __call__(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Begin a function; what it returns or raises is the future's."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        context = contextvars.copy_context()

        def settle(act: Callable[[Any], None], outcome: Any) -> None:
            if not future.done():
                act(outcome)

        def work() -> None:
            try:
                ended = partial(settle, future.set_result, context.run(function))
            except BaseException as error:
                ended = partial(settle, future.set_exception, error)
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(ended)

        self._work.put(work)
        return future

    def end(self) -> None:
        """Let the thread end after what it was given."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


async def in_thread(function: Callable[[], T]) -> T:
    """Run a function in a thread of its own, which goes on if the task is cancelled."""
    worker = _Worker()
    future = worker(function)
    worker.end()
    return await future


async def iterate_in_thread(start: Callable[[Callable[[], None]], Iterator[T]]) -> AsyncIterator[T]:
    """Run an iterator in a thread of its own, one step at a time.

    Args:
        start: makes the iterator, in the thread too. It is given a function that a long step may
            call now and then: it raises once the asynchronous iterator was closed or cancelled.

    Raises:
        Exception: any error that the iterator raises.
    """
    abandoned = threading.Event()

    def check() -> None:
        if abandoned.is_set():
            raise _AbandonedError

    worker = _Worker()
    iterator: Iterator[T] | None = None
    step: asyncio.Future[object] | None = None
    try:
        iterator = await worker(partial(start, check))
        while True:
            step = worker(partial(cast("Callable[..., object]", next), iterator, _END))
            # Shielded, because a thread cannot be cancelled: we need to know when it has ended.
            item = await asyncio.shield(step)
            if item is _END:
                return
            yield cast(T, item)
    finally:
        abandoned.set()
        if isinstance(iterator, Generator):
            if step is None or step.done():
                iterator.close()
            else:
                step.add_done_callback(lambda done: _close(done, iterator))
        worker.end()


def _close(step: asyncio.Future[object], iterator: Generator[object, None, None]) -> None:
    if not step.cancelled():
        step.exception()  # retrieve it, or asyncio logs it as never retrieved
    iterator.close()
