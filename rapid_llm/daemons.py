"""Threads that run models: daemons, whose last step the end of the interpreter waits for.

A thread that is inside PyTorch when the interpreter ends would abort the process ("terminate called
without an active exception").
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from typing import Any

ENDING = threading.Event()
"""Set when the interpreter ends; long steps stop where they would for a cancelled call."""

_WAIT = 30.0  # seconds for the passes under way; a thread that hangs must not keep the process

_running: weakref.WeakKeyDictionary[threading.Thread, Callable[[], object]] = (
    weakref.WeakKeyDictionary()
)


def start(
    target: Callable[..., object], *arguments: Any, name: str, end: Callable[[], object]
) -> threading.Thread:
    """Start a daemon.

    Args:
        target: function that the thread runs.
        arguments: its arguments.
        name: name of the thread.
        end: function that lets the thread end after its current step; called when the interpreter
            ends.
    """
    thread = threading.Thread(target=target, args=arguments, name=name, daemon=True)
    thread.start()
    _running[thread] = end
    return thread


@atexit.register
def _end_all() -> None:
    ENDING.set()
    running = list(_running.items())
    for _, end in running:
        end()
    for thread, _ in running:
        thread.join(_WAIT)
