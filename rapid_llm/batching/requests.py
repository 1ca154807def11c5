"""Requests in the scheduler's queue: delivery of their deltas, time limits, and cancellation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from queue import SimpleQueue
from typing import TypeAlias

from rapid_llm.engine.prefix_cache.reading import Prefill, prefill_of
from rapid_llm.errors import GenerationTimeoutError
from rapid_llm.progress import PromptProgress
from rapid_llm.request import Request
from rapid_llm.results import Delta

Outcome: TypeAlias = Delta | BaseException
"""What a request gets: deltas up to one with a finish reason, or an error."""


class Ticket:
    """A validated request that waits or is under way.

    Args:
        request: the request.
        started: time of the call (``time.perf_counter``).
        progress: callback for the progress of the prefill.
        deliver: function for each outcome, called in the scheduler's thread.
    """

    def __init__(
        self,
        request: Request,
        started: float,
        progress: PromptProgress | None,
        deliver: Callable[[Outcome], object],
    ) -> None:
        self.request = request
        self.started = started
        self.progress = progress
        self._deliver = deliver
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants the answer any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Give the answer up; the scheduler ends it before its next pass."""
        self._cancelled.set()

    def deliver(self, outcome: Outcome) -> None:
        """Hand over a delta or an error, unless the request was cancelled."""
        if self.cancelled:
            return
        try:
            self._deliver(outcome)
        except RuntimeError:  # the event loop of the caller was closed
            self.cancel()

    @cached_property
    def prefill(self) -> Prefill:
        """The passes of the prefill of its prompt."""
        return prefill_of(self.request.runner, self.request.prompt)

    def late(self) -> GenerationTimeoutError | None:
        """The error of a request that has waited longer than its timeout; None before that.

        None too where several ranks answer it: all begin it, and ask the first for the time.
        """
        timeout = self.request.sampling.timeout
        if timeout is None or self.request.runner.ranks is not None:
            return None
        if time.perf_counter() - self.started <= timeout:
            return None
        return GenerationTimeoutError(
            f"timeout={timeout:g} s passed while other requests were answered: raise the timeout "
            "or max_sequences, or send fewer requests at once"
        )


class DeltaStream(Iterator[Delta]):
    """The deltas of one request, as they come; closing it, or dropping it, cancels the request."""

    def __init__(self) -> None:
        self._outcomes: SimpleQueue[Outcome | None] = SimpleQueue()
        self._ticket: Ticket | None = None

    def of(self, ticket: Ticket) -> DeltaStream:
        """Attach the ticket whose outcomes are put into the stream; returns the stream."""
        self._ticket = ticket
        return self

    @property
    def put(self) -> Callable[[Outcome], None]:
        """Function that adds an outcome; it does not keep the stream alive."""
        return self._outcomes.put

    def __next__(self) -> Delta:
        if self._ticket is None:
            raise StopIteration
        outcome = self._outcomes.get()
        if outcome is None:
            raise StopIteration
        if isinstance(outcome, BaseException):
            self._ticket = None
            raise outcome
        if outcome.finish_reason is not None:
            self._ticket = None
        return outcome

    def close(self) -> None:
        """Cancel the request, if it is not answered yet."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            ticket.cancel()
            self._outcomes.put(None)  # for a thread that waits for a delta

    def __del__(self) -> None:
        self.close()
