"""Retry a step after running out of memory, with idle memory freed in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

TRIES = 4
"""Attempts after which memory may run out: a step may capture several graphs."""

_T = TypeVar("_T")


def with_memory(step: Callable[[], _T], free: Callable[[], object]) -> _T:
    """Run a step; when memory runs out, free idle memory and run the step again.

    Args:
        step: function that can be called again after it failed.
        free: function that frees idle memory.

    Raises:
        torch.OutOfMemoryError: memory is short although all idle memory was freed.
    """
    for _ in range(TRIES):
        with suppress(torch.OutOfMemoryError):  # its traceback would keep tensors alive
            return step()
        free()
    return step()
