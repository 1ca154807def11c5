"""Computations as generators that yield the passes they need and receive the results.

An algorithm is written once, from top to bottom: :func:`alone` runs its passes one by one, and
:mod:`rapid_llm.batching` runs many such computations at once and joins their passes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from rapid_llm.engine.device import Judge, NextMask, TokenSampler

if TYPE_CHECKING:
    from rapid_llm.engine.session import Session

T = TypeVar("T")
Y = TypeVar("Y")

Purpose = Literal["read", "draft", "verify"]
"""What a pass is for: a part of a prompt, tokens of a draft, or the verification of one."""


@dataclass(frozen=True, eq=False)
class Extend:
    """Wanted: logits of a session after new tokens.

    Attributes:
        session, tokens, keep, whole: see :meth:`.session.Session.extend`.
        purpose: what the pass is for.
    """

    session: Session
    tokens: Tensor
    keep: int | None = None
    whole: int | None = None
    purpose: Purpose = "read"

    def alone(self) -> Tensor:
        """Run it, by itself."""
        return self.session.extend(self.tokens, self.keep, self.whole)


@dataclass(frozen=True, eq=False)
class DraftAlone:
    """Wanted: a draft on the device without the host, see :meth:`.session.Session.draft`.

    None may be sent instead, with nothing run; passes of single tokens are then wanted.
    """

    session: Session
    pending: Tensor
    steps: int
    choice: TokenSampler
    generator: torch.Generator
    masks: NextMask | None

    def alone(self) -> tuple[Tensor, Tensor] | None:
        """Run it, by itself."""
        return self.session.draft(self.pending, self.steps, self.choice, self.generator, self.masks)


@dataclass(frozen=True, eq=False)
class VerifyAlone:
    """Wanted: a verdict on the device without the host, see :meth:`.session.Session.verify`.

    None may be sent instead, with nothing run; the logits are then wanted.
    """

    session: Session
    tokens: Tensor
    q: Tensor
    eta: Tensor | None
    judge: Judge
    generator: torch.Generator
    mask: Callable[[], Tensor | None]

    def alone(self) -> Tensor | None:
        """Run it, by itself."""
        mask = self.mask()
        return self.session.verify(self.tokens, self.q, self.eta, self.judge, self.generator, mask)


Wanted: TypeAlias = Extend | DraftAlone | VerifyAlone
Steps: TypeAlias = Generator[Wanted, Any, T]
"""A computation that yields the passes it wants, is sent their results, and returns a value."""


def alone(steps: Steps[T]) -> T:
    """Run all passes of a computation one by one; returns its value."""
    results: list[T] = []

    def run() -> Steps[None]:
        results.append((yield from steps))

    running = run()
    item = next(running, None)
    while item is not None:
        item = answered(running, item)
    return results[0]


def each_alone(steps: Generator[Wanted | Y, Any, None]) -> Iterator[Y]:
    """Run the passes of a computation one by one; yields what else it yields.

    The computation runs in inference mode, the caller's code in between does not.
    """
    try:
        with torch.inference_mode():
            item = next(steps, None)
        while item is not None:
            if isinstance(item, Wanted):
                with torch.inference_mode():
                    item = answered(steps, item)
            else:
                yield item
                with torch.inference_mode():
                    item = next(steps, None)
    finally:
        steps.close()


def answered(steps: Generator[Wanted | Y, Any, None], wanted: Wanted) -> Wanted | Y | None:
    """Run a pass by itself, and go on with its result or error; None at the end."""
    try:
        result = wanted.alone()
    except torch.OutOfMemoryError as error:
        failed: BaseException = error.with_traceback(None)  # it would keep tensors alive
    except BaseException as error:
        failed = error
    else:
        return sent(steps, result)
    return thrown(steps, failed)


def sent(steps: Generator[Y, Any, None], result: object) -> Y | None:
    """Go on with the result of a pass; None at the end."""
    try:
        return steps.send(result)
    except StopIteration:
        return None


def thrown(steps: Generator[Y, Any, None], error: BaseException) -> Y | None:
    """Go on with the error of a pass; None at the end."""
    try:
        return steps.throw(error)
    except StopIteration:
        return None
