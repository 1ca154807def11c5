"""Locks of models: one for each, shared by all that run it, and new in a forked process."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from rapid_llm.forked import ProcessLock, in_child

_locks: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_guard = ProcessLock()
in_child(_locks.clear)


def lock_of(model: PreTrainedModel) -> threading.RLock:
    """The lock of a model."""
    with _guard:
        return _locks.setdefault(model, threading.RLock())
