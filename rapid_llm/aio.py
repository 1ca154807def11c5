"""Run blocking work for asyncio in a thread, and cancel it between two steps."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar, cast

from rapid_llm import daemons

T = TypeVar("T")

_Work: TypeAlias = "SimpleQueue[Callable[[], None] | None]"

_END = object()


class _AbandonedError(Exception):
    """The asynchronous iterator was closed or cancelled. Callers never see this error."""


class _Worker:
    """A thread that runs one function after another.

    Not one of asyncio's default executor: generations that wait for a model would take them all,
    and nothing else in the program could use it. The thread ends with the worker, at the latest.
    """

    def __init__(self) -> None:
        self._work: _Work = SimpleQueue()
        daemons.start(_run, self._work, name="rapid-llm", end=partial(self._work.put, None))
        # An iterator whose event loop was closed is never closed itself, only collected.
        weakref.finalize(self, self._work.put, None).atexit = False

    def __call__(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Begin a function; the future gets its result or its error."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        context = contextvars.copy_context()

        def settle(act: Callable[[Any], None], outcome: Any) -> None:
            if not future.done():
                act(outcome)

        def work() -> None:
            try:
                ended = partial(settle, future.set_result, context.run(function))
            except StopIteration as error:  # a future refuses it
                wrapped = RuntimeError(f"StopIteration was raised: {error}")
                wrapped.__cause__ = error
                ended = partial(settle, future.set_exception, wrapped)
            except BaseException as error:
                ended = partial(settle, future.set_exception, error)
            with suppress(RuntimeError):  # the loop is closed, so nobody awaits the result
                loop.call_soon_threadsafe(ended)

        self._work.put(work)
        return future

    def end(self) -> None:
        """Let the thread end after the functions it was given."""
        self._work.put(None)


def _run(queue: _Work) -> None:
    while (work := queue.get()) is not None:
        work()
        del work  # frees the objects that it holds, while the thread waits for more


async def in_thread(function: Callable[[], T]) -> T:
    """Run a function in a thread of its own, which goes on if the task is cancelled."""
    worker = _Worker()
    future = worker(function)
    worker.end()
    return await future


async def iterate_in_thread(
    start: Callable[[Callable[[], None]], Iterator[T]],
) -> AsyncGenerator[T, None]:
    """Run an iterator in a thread of its own, one step at a time.

    Args:
        start: function that returns the iterator, called in the thread. Its argument is a function
            for long steps to call now and then, which raises once the asynchronous iterator was
            closed or cancelled.

    Raises:
        Exception: any error that the iterator raises.
    """
    abandoned = threading.Event()

    def check() -> None:
        if abandoned.is_set() or daemons.ENDING.is_set():
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
            # In the thread, after the step: closing a generation may write its KV to a file.
            closed = worker(iterator.close)
            closed.add_done_callback(_retrieve)
            worker.end()
            if step is None or step.done():
                await asyncio.shield(closed)
            else:  # cancelled: do not wait for the step
                step.add_done_callback(_retrieve)
        else:
            worker.end()


def iterate_with_progress(
    start: Callable[[Callable[..., None]], Iterator[T]], progress: Callable[..., None] | None
) -> AsyncGenerator[T, None]:
    """:func:`iterate_in_thread` for an iterator that can be stopped at its progress callbacks.

    Args:
        start: function that returns the iterator, called with its progress callback.
        progress: callback of the caller, called in the thread; None for none.
    """

    def started(check: Callable[[], None]) -> Iterator[T]:
        def report(*values: Any) -> None:
            check()
            if progress is not None:
                progress(*values)

        return start(report)

    return iterate_in_thread(started)


def _retrieve(step: asyncio.Future[Any]) -> None:
    """Retrieve a future's error, because asyncio logs errors that were never retrieved."""
    if not step.cancelled():
        step.exception()
