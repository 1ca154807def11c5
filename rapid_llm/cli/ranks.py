"""The command line under ``torchrun``: input is read and output printed by rank 0 only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TypeVar

from rapid_llm.errors import InvalidParameterError

RANK = int(os.environ.get("RANK", "0"))
"""Number of this process; only process 0 reads standard input and prints."""

_SHARED = ("ask", "demo", "plan")

_T = TypeVar("_T")


def require_shareable(command: str | None) -> None:
    """Refuse commands that do not run in several processes.

    Raises:
        InvalidParameterError: ``torchrun`` has started several.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and command not in _SHARED:
        raise InvalidParameterError(
            f"{command} runs in one process, not in the {processes} of torchrun: start it without, "
            "and spread the model with --device-map"
        )


def read_once(read: Callable[[], _T]) -> _T:
    """Result of a function that only rank 0 calls, sent to the other ranks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return read()
    from rapid_llm.tensor_parallel import shared

    return shared(read)


@contextmanager
def printing_once() -> Iterator[None]:
    """Context in which only rank 0 prints."""
    if RANK == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
