"""Fork safety: locks that a forked process finds released, and errors for its parent's objects.

A forked child has its parent's memory, but only the thread that forked. Threads of OpenMP, CUDA and
Chroma are gone: code that waits for them, or for a lock that another thread held at the fork, waits
forever.
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
_this_process = uuid.uuid4()  # not the process id, which the system reuses


class ProcessLock:
    """A reentrant lock that a forked child finds released, whichever thread held it.

    Copies and pickles are new, released locks.
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
        """Replace the lock if it is held by a thread that this process does not have."""
        if self._lock.acquire(blocking=False):  # free, or held by the thread that forked
            self._lock.release()
        else:
            self._lock = threading.RLock()


class Owner:
    """The process that made an object; forked children of it cannot use the object.

    Args:
        what: description of the object, for the error.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._process = _this_process
        self._number = os.getpid()

    @property
    def here(self) -> bool:
        """Whether this is the process that made the object."""
        return self._process == _this_process

    def require(self) -> None:
        """Refuse a use of the object by a forked child.

        Raises:
            ForkedProcessError: another process made the object.
        """
        if not self.here:
            raise ForkedProcessError(
                f"{self._what} was loaded in process {self._number} and cannot be used in process "
                f"{os.getpid()}, which was forked from it without the threads of PyTorch and of "
                f"the GPU: {_REMEDY} (multiprocessing.get_context('spawn'); a web server's workers "
                "without preloading)"
            )


def in_child(renew: Callable[[], object]) -> None:
    """Register a function to be called in each forked child before anything else runs there."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
        os.register_at_fork(after_in_child=renew)


def limit_threads() -> None:
    """Set PyTorch to one thread where it was imported before the fork, with one warning.

    OpenMP would wait for the threads that computed in the parent. Call this before anything is
    computed on a CPU.
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
