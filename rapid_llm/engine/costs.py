"""What a forward pass costs on this machine: measured once, and kept for every later process.

Draft lengths follow from these costs, and answers from draft lengths: where a draft moves the
target, and where passes of another size round otherwise. So the first to measure a cost leaves it
in a file, and all others take it from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import uuid
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from math import isfinite, log2
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from rapid_llm.engine.rounding import rounding
from rapid_llm.folders import cache_folder

if TYPE_CHECKING:
    from rapid_llm.engine.session import Session

ROOM = 5
"""Tokens that a cache must have room for, for a pass to be measured."""

_REPEATS = 10


@dataclass(frozen=True)
class PassCost:
    """Seconds of a forward pass over a cache of one length: ``first + row * (n - 1)``."""

    first: float
    row: float

    def seconds(self, tokens: float) -> float:
        return self.first + self.row * (tokens - 1)


_known: dict[Path, PassCost] = {}
_guard = threading.Lock()


def pass_cost(session: Session) -> PassCost:
    """The cost of a pass of 1 and of a few tokens after what the session holds.

    One for each machine, architecture, dtype, device, number of threads, choice of kernels and
    context length (within a factor of √2), in the folder ``pass-costs`` of :func:`cache_folder`.
    Where that cannot be used, a warning says so, and the cost is this process's own. The session is
    left as it was; it needs room for :data:`ROOM` tokens.
    """
    path = cache_folder() / "pass-costs" / f"{_key(session)}.json"
    with _guard:
        known = _known.get(path)
    if known is None:
        found = _agreed(path, session)
        with _guard:
            known = _known.setdefault(path, found)
    return known


def measure(session: Session) -> PassCost:
    """The cost as the clock tells it now, in a pass of 1 token and of a few, in turns.

    The least of a few measurements counts, since whatever disturbs one only adds to it.
    """
    runner, cache, device = session.runner, session.cache, session.runner.device
    held, expected = cache.length, cache.expected
    times: dict[int, list[float]] = {1: [], ROOM: []}
    back = min(ROOM, session.length)
    cache.position_offset -= (
        back  # to positions of this sequence: further ones may be turned otherwise
    )
    # As the end of a sequence, which passes that decode read, unless its KV is of a longer one.
    cache.expected = session.length + back + 1 if runner.switches else 0
    try:
        with runner.lock:  # or the passes of other threads would be measured too
            for n in (1, ROOM) * _REPEATS:
                tokens = torch.zeros(n, dtype=torch.long, device=device)
                started = time.perf_counter()
                runner(tokens, cache, n)
                runner.synchronize()
                times[n].append(time.perf_counter() - started)
                cache.rollback(held)
    finally:
        cache.position_offset += back
        cache.expected = expected
    one, several = min(times[1]), min(times[ROOM])
    return PassCost(one, max(0.0, several - one) / (ROOM - 1))


def _key(session: Session) -> str:
    """Names what a cost depends on; never the run that happens to need it."""
    runner, length = session.runner, session.cache.length
    bucket = round(2 * log2(length + 1))
    told = f"{_architecture(runner.model)} {rounding(runner)} {bucket}"
    return hashlib.sha256(told.encode()).hexdigest()


def _architecture(model: PreTrainedModel) -> str:
    """Of modules, shapes and dtypes: a quantized copy is another one, other weights are not."""
    told = []
    for name, module in model.named_modules():
        told.append(f"{name} {type(module).__name__}")
        told += [
            f"{tuple(tensor.shape)} {tensor.dtype}"
            for tensor in chain(module._parameters.values(), module._buffers.values())
            if tensor is not None
        ]
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "layer_types")]
    heads = [config.num_attention_heads, config.num_key_value_heads]
    return "\n".join([*told, str(windows), str(heads)])


def _agreed(path: Path, session: Session) -> PassCost:
    """What the file says; where there is none, what the first process writes into it."""
    measured = None
    try:
        if not path.exists():
            measured = measure(session)
            _propose(path, measured)
        return _read(path)
    except (OSError, ValueError) as error:
        _warn_once(path.parent, f"{type(error).__name__}: {error}")
        return measured or measure(session)


def _propose(path: Path, cost: PassCost) -> None:
    """Write a file that is whole from the moment it is there, unless another was quicker."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        unfinished.write_text(json.dumps(asdict(cost)), encoding="utf-8")
        with suppress(FileExistsError):
            os.link(unfinished, path)
    finally:
        with suppress(OSError):
            unfinished.unlink()


def _read(path: Path) -> PassCost:
    """Raises OSError or ValueError if the file cannot be read or makes no sense."""
    content = path.read_text(encoding="utf-8")
    try:
        cost = PassCost(**{name: float(value) for name, value in json.loads(content).items()})
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path} holds {content[:100]!r}") from error
    if not (isfinite(cost.first) and isfinite(cost.row) and cost.first > 0 and cost.row >= 0):
        raise ValueError(f"{path} holds {content[:100]!r}")
    return cost


@cache
def _warn_once(folder: Path, problem: str) -> None:
    warnings.warn(
        f"what forward passes cost cannot be kept in {folder} ({problem}), so it is measured in "
        "each process, and one may draft and answer otherwise than another; delete a damaged "
        "file, or set RAPID_LLM_CACHE to a folder that can be written to",
        stacklevel=2,
    )
