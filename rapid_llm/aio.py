"""Run a blocking iterator in a thread as an asynchronous one that can be cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import TypeVar, cast

T = TypeVar("T")

_END = object()


class _AbandonedError(Exception):
    """The asynchronous iterator was closed or cancelled. Callers never see this error."""


async def iterate_in_thread(start: Callable[[Callable[[], None]], Iterator[T]]) -> AsyncIterator[T]:
    """Run an iterator in worker threads, one step at a time, in order.

    Args:
        start: function that makes the iterator, also called in a thread. Its argument is a check
            that a long step may call now and then; it raises once the asynchronous iterator was
            closed or cancelled, which ends the step.

    Raises:
        Exception: any error that the iterator raises.
    """
    abandoned = threading.Event()

    def check() -> None:
        if abandoned.is_set():
            raise _AbandonedError

    iterator: Iterator[T] | None = None
    step: asyncio.Future[object] | None = None
    try:
        iterator = await asyncio.to_thread(start, check)
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, iterator, _END))
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


def _close(step: asyncio.Future[object], iterator: Generator[object, None, None]) -> None:
    if not step.cancelled():
        step.exception()  # retrieve it, or asyncio logs it as never retrieved
    iterator.close()
