"""What a forward pass costs on this machine, measured where the cache stands."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from math import log2
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from rapid_llm.engine.session import Session

_ROWS = 5
_REPEATS = 10


@dataclass(frozen=True)
class PassCost:
    """Seconds of a forward pass over a cache of one length: ``first + row * (n - 1)``."""

    first: float
    row: float

    def seconds(self, tokens: float) -> float:
        return self.first + self.row * (tokens - 1)


_known: WeakKeyDictionary[PreTrainedModel, dict[tuple[str, int], PassCost]] = WeakKeyDictionary()
_guard = threading.Lock()


def pass_cost(session: Session) -> PassCost:
    """The cost of a pass of 1 and of a few tokens after what the session holds.

    Measured once for each model and context length (lengths within a factor of √2 count as one)
    and then kept: decisions that rest on it can be repeated. The session is left as it was.
    """
    forward = session.forward
    key = forward.attn_implementation, round(2 * log2(session.cache.length + 1))
    with _guard:
        known = _known.setdefault(forward.model, {})
    if key not in known:
        rows = min(_ROWS, session.room)
        one, several = _seconds(session, rows)
        cost = PassCost(one, max(0.0, several - one) / max(1, rows - 1))
        if rows < _ROWS:  # too little room for a good measurement
            return cost
        known.setdefault(key, cost)
    return known[key]


def _seconds(session: Session, rows: int) -> tuple[float, float]:
    """Of a pass of 1 token and of ``rows``, in turns: the least of a few, since whatever disturbs
    a measurement only adds to it."""
    length, device = session.length, session.forward.device
    times: dict[int, list[float]] = {1: [], rows: []}
    for n in (1, rows) * _REPEATS:
        tokens = torch.zeros(n, dtype=torch.long, device=device)
        started = time.perf_counter()
        session.extend(tokens)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times[n].append(time.perf_counter() - started)
        session.rollback(length)
    return min(times[1]), min(times[rows])
