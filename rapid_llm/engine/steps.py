"""Generators that yield the forward passes they need, run one by one or joined with others.

An algorithm is written once, from top to bottom: :func:`alone` runs its passes one by one, and
:mod:`rapid_llm.batching` runs many such computations at once and joins their passes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from typing import Any, TypeAlias, TypeVar

import torch

T = TypeVar("T")
Y = TypeVar("Y")


class Wanted(ABC):
    """Forward passes that a computation asks for, whose result is then sent to it."""

    @abstractmethod
    def run(self) -> Any:
        """Run the passes by themselves; returns their result."""


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


def answered(steps: Generator[Wanted | Y, Any, None], item: Wanted | Y) -> Wanted | Y | None:
    """Go on after an item, with the result or error of a pass run by itself; None at the end."""
    if not isinstance(item, Wanted):
        return next(steps, None)
    try:
        result = item.run()
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
