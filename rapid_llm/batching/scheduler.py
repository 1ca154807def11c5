"""The scheduler of a decoder: answers many requests at once, first come, first served.

One thread runs all passes, in rounds (:mod:`rapid_llm.batching.rounds`); it lives while there are
requests. Requests on one document share its KV: one reads it, the others wait for that and borrow.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import torch

from rapid_llm import daemons
from rapid_llm.aio import in_thread
from rapid_llm.arguments import arguments_of
from rapid_llm.batching.requests import DeltaStream, Outcome, Ticket
from rapid_llm.batching.rounds import run_round
from rapid_llm.batching.sequence import Sequence
from rapid_llm.config import EngineConfig
from rapid_llm.errors import InvalidParameterError, RapidError
from rapid_llm.generation_factory import GenerationFactory
from rapid_llm.interface import Decoder, GenerationRequest
from rapid_llm.options import changed
from rapid_llm.progress import PromptProgress
from rapid_llm.request import Request
from rapid_llm.results import Delta

_log = logging.getLogger(__name__)


class Models(Protocol):
    """What the scheduler needs of a :class:`rapid_llm.RapidDecoder`.

    Attributes:
        max_sequences: maximum number of requests under way.
        generations: factory of generations.
    """

    max_sequences: int
    generations: GenerationFactory

    def request(self, *prompts: Any, **options: Any) -> Request:
        """Validate a call, and encode its prompts; no model runs."""


class _Checked(NamedTuple):
    """A validated request, or what is wrong with it, and its callback."""

    request: Request | Exception
    progress: PromptProgress | None


class Scheduler(Decoder):
    """Answers many requests of threads and tasks at once; its methods are the decoder's.

    Passes of all requests under way are joined: each weight is read once for all of them, and each
    document once for all questions on it. A request gets the law that it gets alone, and the same
    tokens but for rounding; one that nobody joins runs the passes of a single call. With
    ``gamma="auto"`` draft lengths follow the number of requests, so that sampled tokens, and in
    modes with knowledge transfer their law, depend on it as they do on draft lengths.

    Joined passes take models of the Llama family with our attention and a fixed rotary embedding;
    requests to others are answered one by one, and the log says so once. Those to a model that is
    sharded over ranks run one by one in the thread of the call, beginning at the first delta.

    Args:
        decoder: the models.
        max_sequences: maximum number of requests under way; more wait, first come, first served.
            1 answers them one by one, by the passes of single calls. None: the decoder's.

    Raises:
        InvalidParameterError: ``max_sequences`` is less than 1.
    """

    def __init__(self, decoder: Models, *, max_sequences: int | None = None) -> None:
        if max_sequences is None:
            max_sequences = decoder.max_sequences
        limits = changed(EngineConfig(), {"max_sequences": max_sequences})
        self.decoder = decoder
        self.max_sequences = limits.max_sequences
        self._lock = threading.Lock()
        self._waiting: list[Ticket] = []
        self._running: list[Sequence] = []
        self._most = self.max_sequences  # fewer while memory is short
        self._thread: threading.Thread | None = None
        self._said = False

    @arguments_of(GenerationRequest)
    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        """:meth:`.RapidDecoder.stream`, beside other requests.

        The request begins at the call. Closing the stream, or dropping it, cancels the request
        before its next pass. ``progress`` is called in the scheduler's thread; an error that it
        raises ends this request alone.
        """
        validated = self._validated(request)
        if self._sharded:
            return self.decoder.generations.answer(validated, time.perf_counter(), request.progress)
        stream = DeltaStream()
        return stream.of(self._submit(validated, request.progress, stream.put))

    @arguments_of(GenerationRequest)
    def astream(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """:meth:`stream` for asyncio; the request begins at the first delta that is asked for."""
        if self._sharded:
            return super().astream(*request.prompts, **request.options)
        return self._astream(request)

    async def _astream(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        loop, outcomes = asyncio.get_running_loop(), asyncio.Queue[Outcome]()
        validated = await in_thread(partial(self._validated, request))

        def deliver(outcome: Outcome) -> None:
            loop.call_soon_threadsafe(outcomes.put_nowait, outcome)

        ticket = self._submit(validated, request.progress, deliver)
        try:
            while True:
                outcome = await outcomes.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
                if outcome.finish_reason is not None:
                    return
        finally:
            ticket.cancel()

    def _stream_many(
        self, requests: Iterable[GenerationRequest], return_exceptions: bool
    ) -> Iterator[tuple[int, Delta | Exception]]:
        return self._outcomes(self._checked(requests, return_exceptions), return_exceptions)

    def _checked(
        self, requests: Iterable[GenerationRequest], return_exceptions: bool
    ) -> list[_Checked]:
        """Validate requests, before any of them begins."""

        def checked(request: GenerationRequest) -> _Checked:
            try:
                return _Checked(self._validated(request), request.progress)
            except Exception as error:
                if not return_exceptions:
                    raise
                return _Checked(error, None)

        return list(map(checked, requests))

    def _outcomes(
        self, requests: list[_Checked], return_exceptions: bool
    ) -> Iterator[tuple[int, Delta | Exception]]:
        answers = self._one_by_one if self._sharded else self._streamed
        return answers(requests, return_exceptions)

    @property
    def _sharded(self) -> bool:
        """Whether the model is sharded over ranks; its requests run in the caller's thread.

        The scheduler's would be at another pass on each rank when the caller closes a stream.
        """
        return self.decoder.generations.pair.target.ranks is not None

    def _one_by_one(
        self, requests: list[_Checked], return_exceptions: bool
    ) -> Iterator[tuple[int, Delta | Exception]]:
        """Answer requests in the caller's thread."""
        started = time.perf_counter()

        def outcomes(checked: _Checked) -> Iterator[Delta | Exception]:
            try:
                if isinstance(checked.request, Exception):
                    raise checked.request
                yield from self.decoder.generations.answer(
                    checked.request, started, checked.progress
                )
            except Exception as error:
                if not return_exceptions:
                    raise
                yield error

        for index, each in enumerate(requests):
            for outcome in outcomes(each):
                yield index, outcome

    def _streamed(
        self, requests: list[_Checked], return_exceptions: bool
    ) -> Iterator[tuple[int, Delta | Exception]]:
        outcomes: SimpleQueue[tuple[int, Outcome]] = SimpleQueue()

        def put(index: int, outcome: Outcome) -> None:
            outcomes.put((index, outcome))

        tickets = []
        missing = len(requests)
        try:
            for index, (request, progress) in enumerate(requests):
                if isinstance(request, Exception):
                    put(index, request)
                else:
                    tickets.append(self._submit(request, progress, partial(put, index)))
            while missing:
                index, outcome = outcomes.get()
                if isinstance(outcome, Delta):
                    missing -= outcome.finish_reason is not None
                    yield index, outcome
                elif return_exceptions and isinstance(outcome, Exception):
                    missing -= 1
                    yield index, outcome
                else:
                    raise outcome
        finally:
            for ticket in tickets:
                ticket.cancel()

    def _validated(self, request: GenerationRequest) -> Request:
        return self.decoder.request(*request.prompts, **request.options)

    def _submit(
        self,
        request: Request,
        progress: PromptProgress | None,
        deliver: Callable[[Outcome], object],
    ) -> Ticket:
        """Queue a request; starts the thread if there is none."""
        if threading.current_thread() is self._thread:
            raise InvalidParameterError(
                "a progress callback asked the scheduler that called it, and would wait for itself "
                "for ever: ask from another thread, or by RapidDecoder.generate"
            )
        ticket = Ticket(request, time.perf_counter(), progress, deliver)
        with self._lock:
            self._waiting.append(ticket)
            if self._thread is None:
                try:  # its first act waits for the lock
                    self._thread = daemons.start(
                        self._work, name="rapid-llm-scheduler", end=self._cancel_all
                    )
                except BaseException:  # later requests must not wait for it
                    self._waiting.remove(ticket)
                    raise
        return ticket

    def _cancel_all(self) -> None:
        with self._lock:
            tickets = [*self._waiting, *(each.ticket for each in self._running)]
        for ticket in tickets:
            ticket.cancel()

    @torch.inference_mode()
    def _work(self) -> None:
        """Run rounds until no request is left."""
        try:
            while self._admit():
                run_round(self._running)
        except BaseException as error:  # a defect of ours: nobody must wait for ever
            with self._lock:
                left, self._waiting, self._thread = self._waiting, [], None
            running, self._running = self._running, []
            for ticket in [*(each.ticket for each in running), *left]:
                ticket.deliver(error)
            for each in running:
                _end(each)
            raise

    def _admit(self) -> bool:
        """End what was cancelled and start what may start; returns whether anything is left."""
        alone = len(self._running) == 1
        for each in self._running:
            if each.ticket.cancelled:
                _end(each)
        ended = [each for each in self._running if each.wanted is None]
        self._running = [each for each in self._running if each.wanted is not None]
        self._most = min(self._most + len(ended), self.max_sequences)
        for each in reversed(ended):  # so that the first is the next one again
            self._wait_for_memory(each, alone)
        while (ticket := self._next()) is not None:
            # The first is opened as a single call is, so that a request that stays alone gets what
            # a single call gets, to the bit; those beside it borrow from its cache.
            joined = bool(self._running) and self._joins(ticket)
            started = Sequence(ticket, self.decoder.generations, joined=joined)
            started.start()
            if started.wanted is not None:
                self._running.append(started)
            else:
                self._wait_for_memory(started, not self._running)
        with self._lock:
            if self._running or self._waiting:
                return True
            self._thread = None
            return False

    def _wait_for_memory(self, ended: Sequence, alone: bool) -> None:
        """Let a request that found no memory beside others be the next one, once one has ended."""
        if ended.starved is None:
            return
        if alone:
            ended.ticket.deliver(ended.starved)
            return
        self._most = max(1, len(self._running))
        with self._lock:
            self._waiting.insert(0, ended.ticket)

    def _next(self) -> Ticket | None:
        """Take the first waiting request that may start now; None if there is none."""
        with self._lock:
            waiting = list(self._waiting)
        # Outside the lock, as callers must not wait for a pass.
        for ticket in waiting:
            error = None if ticket.cancelled else ticket.late()
            if error is not None:
                ticket.deliver(error)
                ticket.cancel()
        waiting = [ticket for ticket in waiting if not ticket.cancelled]
        room = bool(waiting) and self._has_room(waiting[0])
        # The next ones only, as each look takes a millisecond, and thousands may wait.
        ahead = waiting[: self.max_sequences] if room else []
        found = next((each for each in ahead if not self._will_borrow(each)), None)
        if found is not None and not self._has_room(found):
            found = None
        with self._lock:
            self._waiting = [e for e in self._waiting if not e.cancelled and e is not found]
        return found

    def _has_room(self, ticket: Ticket) -> bool:
        """Whether a request may run beside those under way."""
        tickets = [ticket, *(each.ticket for each in self._running)]
        together = all(map(self._joins, tickets))
        return len(self._running) < (self._most if together else 1)

    def _joins(self, ticket: Ticket) -> bool:
        """Whether the passes of a request can be joined; the log says so once if not."""
        runner = ticket.request.runner
        if not runner.joins and not self._said:
            self._said = True
            _log.warning(
                "%s cannot read several sequences in one pass, which takes a model of the Llama "
                "family in one process, with our attention and a fixed rotary embedding: requests "
                "are answered one by one",
                runner.name,
            )
        return runner.joins

    def _will_borrow(self, ticket: Ticket) -> bool:
        """Whether another request is reading most of the prompt right now."""
        if not any(each.reading for each in self._running):
            return False
        request = ticket.request
        try:
            return self.decoder.generations.prefixes.will_lend(request.runner, ticket.prefill)
        except RapidError:  # of its model, which is told to it when it starts
            return False


def _end(sequence: Sequence) -> None:
    """Stop a sequence whose answer nobody waits for; its errors must not stop others."""
    try:
        sequence.end()
    except Exception:
        _log.exception("an answer that was given up could not be ended properly")
