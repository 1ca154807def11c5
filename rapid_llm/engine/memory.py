"""Retry a step after running out of memory, with idle memory freed in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TypeVar

import torch

_TRIES = 4  # attempts after which memory may run out: a step may capture several graphs

_T = TypeVar("_T")


def attempts(free: Callable[[], object]) -> Iterator[AbstractContextManager[bool | None]]:
    """Contexts for the attempts at a step, which is to return within the first that succeeds.

    All but the last suppress running out of memory, and ``free`` is called after them.

    Args:
        free: function that frees idle memory.
    """
    for _ in range(_TRIES):
        yield suppress(torch.OutOfMemoryError)  # its traceback would keep tensors alive
        free()
    yield nullcontext()


def with_memory(step: Callable[[], _T], free: Callable[[], object]) -> _T:
    """Run a step; when memory runs out, free idle memory and run the step again.

    Args:
        step: function that can be called again after it failed.
        free: function that frees idle memory.

    Raises:
        torch.OutOfMemoryError: memory is short although all idle memory was freed.
    """
    for attempt in attempts(free):
        with attempt:
            return step()
    raise AssertionError("the last attempt returns or raises")
