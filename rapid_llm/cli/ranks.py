"""The command line in the processes of ``torchrun``, over which a model is sharded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TypeVar

from rapid_llm.errors import InvalidParameterError

RANK = int(os.environ.get("RANK", "0"))
"""Number of this process; 0 alone reads standard input and prints."""

_SHARED = ("ask", "demo", "plan")

_T = TypeVar("_T")


def require_shareable(command: str | None) -> None:
    """Refuse commands that one process runs.

    Raises:
        InvalidParameterError: there are several processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and command not in _SHARED:
        raise InvalidParameterError(
            f"{command} runs in one process, not in the {processes} of torchrun: start it without, "
            "and spread the model with --device-map"
        )


def read_once(read: Callable[[], _T]) -> _T:
    """What rank 0 alone reads, handed to the other ranks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return read()
    from rapid_llm.tensor_parallel import shared

    return shared(read)


@contextmanager
def printing_once() -> Iterator[None]:
    """Nothing that other ranks than 0 print is seen."""
    if RANK == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
