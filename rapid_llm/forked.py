"""Processes made by fork: what a child cannot use of its parent, and what it has to renew.

A forked child has its parent's memory, but only the thread that forked. Threads of OpenMP, CUDA and
Chroma are gone, and whoever waits for them waits for ever; so does whoever waits for a lock that
another thread held at the fork.
"""

from __future__ import annotations

import os
import sys
import threading
import uuid
import warnings
from collections.abc import Callable
from types import TracebackType
from weakref import WeakSet

from rapid_llm.errors import ForkedProcessError

_REMEDY = "load it in this process, after the fork, or start processes by 'spawn'"

_locks: WeakSet[ProcessLock] = WeakSet()
_torch_is_inherited = False
_this_process = uuid.uuid4()  # not its number, which the system gives out again


class ProcessLock:
    """A reentrant lock that a forked child finds released, whoever held it in the parent.

    Copied or pickled, it is another one, released.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    def __enter__(self) -> bool:
        return self._lock.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.__exit__(kind, error, trace)

    def __reduce__(self) -> tuple[type[ProcessLock], tuple[()]]:
        return ProcessLock, ()

    def renew(self) -> None:
        """Replace the lock if a thread holds it that is not here."""
        if self._lock.acquire(blocking=False):  # nobody does, or the thread that forked
            self._lock.release()
        else:
            self._lock = threading.RLock()


class Owner:
    """The process that made an object, which no child of it can use.

    Args:
        what: description of the object, for the error.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._process = _this_process
        self._number = os.getpid()

    @property
    def here(self) -> bool:
        """Whether this is the process."""
        return self._process == _this_process

    def require(self) -> None:
        """Refuse to be used by a forked child.

        Raises:
            ForkedProcessError: this is another process.
        """
        if not self.here:
            raise ForkedProcessError(
                f"{self._what} was loaded in process {self._number} and cannot be used in process "
                f"{os.getpid()}, which was forked from it without the threads of PyTorch and of "
                f"the GPU: {_REMEDY} (multiprocessing.get_context('spawn'); a web server's workers "
                "without preloading)"
            )


def in_child(renew: Callable[[], object]) -> None:
    """Have a function called in each forked child, before anything else runs there."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
        os.register_at_fork(after_in_child=renew)


def limit_threads() -> None:
    """Have PyTorch compute with one thread where it was imported before the fork.

    OpenMP would wait for the threads that computed in the parent. To be called before anything is
    computed on a CPU; a warning says it once.
    """
    global _torch_is_inherited
    if not _torch_is_inherited:
        return
    _torch_is_inherited = False
    import torch

    if torch.get_num_threads() == 1:
        return
    torch.set_num_threads(1)
    warnings.warn(
        "this process was forked from one that had imported PyTorch, whose threads are not here: "
        "it computes on the CPU with one thread. Start processes by 'spawn' to use more",
        stacklevel=3,
    )


def _after_fork() -> None:
    global _torch_is_inherited, _this_process
    _torch_is_inherited = "torch" in sys.modules
    _this_process = uuid.uuid4()
    for lock in list(_locks):
        lock.renew()


in_child(_after_fork)
