"""A running request: its generation, and the forward pass that it waits for."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch

from rapid_llm.batching.requests import Ticket
from rapid_llm.engine.session import Extend
from rapid_llm.engine.steps import Wanted, answered, sent, thrown
from rapid_llm.generation import Generation
from rapid_llm.generation_factory import GenerationFactory
from rapid_llm.results import Delta


class Sequence:
    """A request under way.

    Args:
        ticket: the request.
        generations: factory of its generation.
        joined: whether it is opened to share KV and passes with others; one that is not may still
            lend its KV, and join their passes.

    Attributes:
        ticket: the request.
        wanted: the pass that it waits for; None once it has ended.
        by_itself: whether it runs device-side drafts and verifications, which serve one sequence.
        starved: the error of one that found no memory before its first delta; None otherwise.
    """

    def __init__(self, ticket: Ticket, generations: GenerationFactory, *, joined: bool) -> None:
        self.ticket = ticket
        self.wanted: Extend | None = None
        self.by_itself = not joined
        self.starved: torch.OutOfMemoryError | None = None
        self._begun = False
        self._joined = joined
        self._generations = generations
        self._context = ExitStack()
        self._generation: Generation | None = None
        self._steps: Generator[Wanted | Delta, Any, None] | None = None

    @property
    def reading(self) -> bool:
        """Whether it waits for a pass over its prompts."""
        return self.wanted is not None and self.wanted.purpose == "read"

    def start(self) -> None:
        """Open the generation, and go on to its first pass."""
        request = self.ticket.request

        def begin() -> Wanted | Delta | None:
            opened = self._generations.open(request, self.ticket.started, joined=self._joined)
            self._generation = self._context.enter_context(opened)
            self._steps = self._generations.steps(request, self._generation, self.ticket.progress)
            return next(self._steps, None)

        self._go_on(begin)

    def expect(self, sequences: int) -> None:
        """Tell the generation how many sequences decode together."""
        if self._generation is not None:
            self._generation.sequences = sequences

    def send(self, result: object) -> None:
        """Go on with the result of the wanted pass."""
        assert self._steps is not None
        self._go_on(partial(sent, self._steps, result))

    def throw(self, error: BaseException) -> None:
        """Go on with the error of the wanted pass."""
        assert self._steps is not None
        self._go_on(partial(thrown, self._steps, error))

    def run(self) -> None:
        """Run the wanted pass by itself, and go on."""
        assert self._steps is not None
        assert self.wanted is not None
        self._go_on(partial(answered, self._steps, self.wanted))

    def end(self) -> None:
        """Stop; what was read of the prompt is kept."""
        self.wanted = None
        try:
            if self._steps is not None:
                self._steps.close()
        finally:
            self._context.close()

    def _go_on(self, move: Callable[[], Wanted | Delta | None]) -> None:
        """Make a move, deliver deltas, and stop at the next pass or at the end."""
        try:
            item = move()
            while item is not None and not isinstance(item, Extend):
                assert self._steps is not None
                if isinstance(item, Delta):
                    self._begun = True
                    self.ticket.deliver(item)
                    item = next(self._steps, None)
                elif self.by_itself:
                    item = answered(self._steps, item)
                else:
                    item = sent(self._steps, None)
            self.wanted = item
            if item is None:
                self.end()
        except BaseException as error:
            with suppress(Exception):  # the first error is the one to tell, and to this one alone
                self.end()
            if isinstance(error, torch.OutOfMemoryError) and not self._begun:
                self.starved = error.with_traceback(None)  # it would keep tensors alive
            else:
                self.ticket.deliver(error)
