"""Admission of requests: how many run, how many wait, and which are refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import ceil

from rapid_llm.server.errors import ApiError

_LONGEST = 60  # seconds after which a refused client is told to come again, at most


class Admission:
    """Lets requests run in the order in which they came, so many at once.

    Args:
        running: number of requests that run at once.
        waiting: number of requests that may wait.

    Attributes:
        active: number of requests that run.
        queued: number of requests that wait.
        refused: number of requests that were refused.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self.active = self.queued = self.refused = 0
        self._running, self._waiting = running, waiting
        self._turns = asyncio.Semaphore(running)  # first come, first served
        self._seconds = 1.0  # of a request, a running mean

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn, and hold it.

        Raises:
            ApiError: too many requests wait already.
        """
        if self._turns.locked() and self.queued >= self._waiting:
            self.refused += 1
            seconds = ceil(self._seconds * (self.queued + 1) / self._running)
            raise ApiError(
                429,
                f"{self.active} requests run and {self.queued} wait, which is all that this server "
                "takes: try again later",
                code="queue_full",
                headers={"Retry-After": str(min(max(seconds, 1), _LONGEST))},
            )
        self.queued += 1
        try:
            await self._turns.acquire()
        finally:
            self.queued -= 1
        self.active += 1
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds += 0.2 * (time.monotonic() - started - self._seconds)
            self.active -= 1
            self._turns.release()
