"""Run a step again after memory ran out, with idle memory freed in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

from rapid_llm.engine.steps import Steps

_TRIES = 4  # attempts after running out of memory: a step may capture several graphs

_T = TypeVar("_T")


def with_memory(step: Callable[[], _T], free: Callable[[], object]) -> _T:
    """Run a step; when memory runs out, free idle memory and run the step again.

    Args:
        step: function that can be called again after it failed.
        free: function that frees idle memory.

    Raises:
        torch.OutOfMemoryError: memory is short although all idle memory was freed.
    """
    for _ in range(_TRIES):
        with suppress(torch.OutOfMemoryError):  # its traceback would keep tensors alive
            return step()
        free()
    return step()


def steps_with_memory(step: Callable[[], Steps[_T]], free: Callable[[], object]) -> Steps[_T]:
    """:func:`with_memory` for a step that yields the passes it wants."""
    for _ in range(_TRIES):
        with suppress(torch.OutOfMemoryError):
            return (yield from step())
        free()
    return (yield from step())
