"""Measure the cost of forward passes once per machine, and keep it in files.

Draft lengths depend on these costs, and answers can depend on draft lengths: drafts transfer
knowledge, and passes of other sizes round differently. So the first process to measure a cost
writes it to a file, and all others read it from there, which makes answers repeatable.
"""

from __future__ import annotations

import hashlib
import json
import os
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

from rapid_llm.engine.parts import Part
from rapid_llm.engine.rounding import rounding
from rapid_llm.folders import cache_folder
from rapid_llm.forked import ProcessLock

if TYPE_CHECKING:
    from rapid_llm.engine.session import Session

ROOM = 5
"""Number of free tokens that a cache needs for a measurement."""

_REPEATS = 10
_SEQUENCES = 8  # in joined passes


@dataclass(frozen=True)
class PassCost:
    """Seconds of a forward pass of n tokens at one context length: ``first + row * (n - 1)``.

    Attributes:
        first: seconds of a pass of one token.
        row: seconds of each further token.
    """

    first: float
    row: float

    def seconds(self, tokens: float) -> float:
        return self.first + self.row * (tokens - 1)

    def together(self, sequences: int) -> PassCost:
        """Cost of joined passes, of n tokens of each of so many sequences."""
        return PassCost(self.seconds(sequences), self.row * sequences)


_known: dict[Path, PassCost] = {}
_guard = ProcessLock()


def pass_cost(session: Session) -> PassCost:
    """Cost of passes at the session's context length, measured or read from a file.

    There is one file for each machine, architecture, dtype, device, number of threads, choice of
    kernels and context length (within a factor of √2), in the folder ``pass-costs`` of
    :func:`cache_folder`. Where that folder cannot be used, a warning says so, and the cost is
    measured for this process only.

    Args:
        session: session with room for :data:`ROOM` more tokens; it does not change.
    """
    path = cache_folder() / "pass-costs" / f"{_key(session)}.json"
    ranks = session.runner.ranks
    with _guard:
        known = _known.get(path)
    known = known or _found(path)
    if ranks is not None:  # all measure, or none does
        known = ranks.from_first(known)
    if known is None:
        known = measure(session)
        if ranks is None or ranks.rank == 0:
            known = _kept(path, known)
        if ranks is not None:
            known = ranks.from_first(known)
    with _guard:
        return _known.setdefault(path, known)


def measure(session: Session) -> PassCost:
    """Measure the cost of passes of 1 and of :data:`ROOM` tokens, alternating.

    Joined passes are of so many tokens of each of several sequences, which share all that the
    session holds. The minimum of several measurements is taken, because disturbances only add time.
    """
    runner, cache, device = session.runner, session.cache, session.runner.device
    held, expected = cache.length, cache.expected
    times: dict[int, list[float]] = {1: [], ROOM: []}
    back = 0 if session.joined else min(ROOM, session.length)
    # Other threads' passes are kept out: of the measurement, and as they may read what the sequence
    # lends, at its positions.
    with runner.lock:
        # At positions that the sequence has reached: rotary scaling may change beyond them.
        cache.position_offset -= back
        # Passes that decode end their sequence, unless its KV belongs to a longer one.
        cache.expected = session.length + back + 1 if runner.switches else 0
        together = [cache]
        if session.joined:
            together = [cache.borrow(held, held + ROOM) for _ in range(_SEQUENCES)]
        try:
            for n in (1, ROOM) * _REPEATS:
                tokens = torch.zeros(n, dtype=torch.long, device=device)
                started = time.perf_counter()
                if session.joined:
                    runner.joined([Part(tokens, each, n) for each in together])
                else:
                    runner(tokens, cache, n)
                runner.synchronize()
                times[n].append(time.perf_counter() - started)
                for each in together:
                    each.rollback(held)
        finally:
            cache.position_offset += back
            cache.expected = expected
    one, several = min(times[1]), min(times[ROOM])
    row = max(0.0, several - one) / (ROOM - 1) / len(together)
    return PassCost(max(one - row * (len(together) - 1), one / len(together)), row)


def _key(session: Session) -> str:
    """Hash of everything that a cost depends on."""
    runner, length = session.runner, session.cache.length
    bucket = round(2 * log2(length + 1))
    kind = f" {_SEQUENCES} joined" if session.joined else ""
    description = f"{_architecture(runner.model)} {rounding(runner)} {bucket}{kind}"
    return hashlib.sha256(description.encode()).hexdigest()


def _architecture(model: PreTrainedModel) -> str:
    """Description of a model's modules, shapes and dtypes, without its weights."""
    lines = []
    for name, module in model.named_modules():
        lines.append(f"{name} {type(module).__name__}")
        lines += [
            f"{tuple(tensor.shape)} {tensor.dtype}"
            for tensor in chain(module._parameters.values(), module._buffers.values())
            if tensor is not None
        ]
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "layer_types")]
    heads = [config.num_attention_heads, config.num_key_value_heads]
    return "\n".join([*lines, str(windows), str(heads)])


def _found(path: Path) -> PassCost | None:
    """The cost in a file; None if there is none, or it cannot be read."""
    try:
        return _read(path) if path.exists() else None
    except (OSError, ValueError) as error:
        _warn_once(path.parent, f"{type(error).__name__}: {error}")
        return None


def _kept(path: Path, measured: PassCost) -> PassCost:
    """Write a cost to a file, unless another process was first; returns what is in the file."""
    try:
        _write_if_absent(path, measured)
        return _read(path)
    except (OSError, ValueError) as error:
        _warn_once(path.parent, f"{type(error).__name__}: {error}")
        return measured


def _write_if_absent(path: Path, cost: PassCost) -> None:
    """Write a file atomically, unless it exists by then."""
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
    """Read the cost in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: its content is invalid.
    """
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
        f"the costs of forward passes cannot be kept in {folder} ({problem}), so each process "
        "measures them, and processes may draft and answer differently; delete a damaged file, or "
        "set RAPID_LLM_CACHE to a writable folder",
        stacklevel=2,
    )
