"""Side-by-side measurements: every method in turn, in one process, on the same prompts.

A round of the turn is one run of every method, so that a change in the machine's load meets all
of them. The first round warms up and is not counted; results are medians, with their range. In it
peers read the drafter's prompt: unlike us they measure nothing in a run that the next one uses, and
on a CPU a long prompt takes them minutes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers

from rapid_llm.bench.methods import Method, Run
from rapid_llm.bench.model_size import size_of
from rapid_llm.bench.plan import Plan
from rapid_llm.bench.speed_model import Device, ModelSize
from rapid_llm.bench.this_device import measure_device
from rapid_llm.bench.workload import Workload
from rapid_llm.config import SamplingParams
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.cpu.blocks import BlockLinear
from rapid_llm.engine.session import Session
from rapid_llm.errors import ContextWindowError, InvalidParameterError
from rapid_llm.stats import Stats

VERIFIED = 5
"""Tokens of the verification pass that is compared with a plain step."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """A method in one cell; every list has one number a counted run."""

    method: str
    ms_per_token: list[float]
    prefill: list[float]
    stats: Stats | None

    @property
    def ms(self) -> float:
        return median(self.ms_per_token)


@dataclass(frozen=True)
class Cell:
    """One task at one context length."""

    task: str
    context: int
    target_tokens: int
    draft_tokens: int
    rows: dict[str, Row]

    def ratio(self, method: str, to: str) -> float | None:
        """How many times as fast a method decodes as another; None if that was not run."""
        return self.rows[to].ms / self.rows[method].ms if to in self.rows else None

    def as_dict(self) -> dict[str, Any]:
        rows = []
        for row in self.rows.values():
            stats = row.stats
            entry = asdict(row) | {
                "tokens_per_second": 1000 / row.ms,
                "ratio_to_lc": self.ratio(row.method, "lc"),
                "ratio_to_generate": self.ratio(row.method, "transformers generate"),
                "stats": stats and stats.as_dict(),
            }
            if stats is not None and stats.rounds and "lc" in self.rows:
                plain = self.rows["lc"].ms / 1000
                entry |= Costs.of(stats, plain)._asdict()
            rows.append(entry)
        return asdict(self) | {"rows": rows}


class Costs(NamedTuple):
    """The mean γ, and in plain steps: c, a pass of the drafter, and v, a verification."""

    gamma: float
    c: float | None
    v: float

    @classmethod
    def of(cls, stats: Stats, plain: float) -> Costs:
        """``plain``: seconds of a plain step. c is None where no model drafted."""
        passes = stats.draft_passes
        return cls(
            gamma=stats.drafted_tokens / stats.rounds,
            c=stats.draft_seconds / passes / plain if passes else None,
            v=(stats.decode_seconds - stats.draft_seconds) / stats.rounds / plain,
        )


@dataclass(frozen=True)
class Engine:
    """What does not depend on the answer, at one context length; seconds and bytes.

    Attributes:
        step: a plain step, one token.
        verification: a pass of ``VERIFIED`` tokens.
        bytes_read: weights and KV that a plain step reads.
        first_question, second_question: time to the first token of RAPID on a document that is
            new, and on one of which another question was asked before.
        predicted: the speed model's speedups over plain decoding for this machine, at the
            acceptance rates that were measured, by row of the table.
    """

    context: int
    step: list[float]
    verification: list[float]
    bytes_read: int
    first_question: list[float]
    second_question: list[float]
    predicted: dict[str, float]


@dataclass(frozen=True)
class Report:
    """What was measured, where, and on what."""

    model: str
    dtype: str
    device: str
    threads: int
    torch: str
    transformers: str
    new_tokens: int
    repeats: int
    read_bandwidth: float
    load_average: list[float]
    cells: list[Cell]
    engines: list[Engine]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"cells": [cell.as_dict() for cell in self.cells]}


def measure(
    decoder: RapidDecoder,
    methods: Mapping[str, Method],
    works: Sequence[Workload],
    *,
    peers: Mapping[str, Method] | None = None,
    new_tokens: int,
    repeats: int,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Run every method on every workload.

    Args:
        decoder: runs the engine's measurements; ``methods`` are usually built around it.
        methods: what to compare, by name.
        works: contexts and tasks.
        peers: others to compare, whose runs do not depend on those before.
        new_tokens: tokens decoded in a run, at least 2.
        repeats: counted runs of each, at least 1.
        progress: called with (runs done, runs to do).

    Raises:
        InvalidParameterError: a number is too small.
        ContextWindowError: a prompt and the new tokens exceed the model's window.
    """
    for name, value, least in (("new_tokens", new_tokens, 2), ("repeats", repeats, 1)):
        if value < least:
            raise InvalidParameterError(
                f"{name}={value} is not allowed: {name} must be at least {least}"
            )
    window = decoder.target.context_window
    for work in works:
        if (needed := len(work.target) + new_tokens) > window:
            raise ContextWindowError(
                f"a prompt of {len(work.target)} tokens and {new_tokens} new ones need {needed}, "
                f"the context window of {decoder.target.name} has {window}: take a shorter context"
            )
    load = _load_average()
    bandwidth = read_bandwidth(decoder.target.device)
    peers = peers or {}
    every = {**methods, **peers}
    total, done = len(works) * len(every) * (repeats + 1), 0
    cells = []
    for work in works:
        runs: dict[str, list[Run]] = {name: [] for name in every}
        short = replace(work, target=work.draft)
        for turn in range(repeats + 1):
            decoder.clear_cache()  # so that each turn reads the prompt once more
            for name, method in every.items():
                progress(done, total)
                warming = turn == 0 and name in peers
                runs[name].append(method(short if warming else work, new_tokens))
                done += 1
        rows = {name: _row(name, some[1:]) for name, some in runs.items()}
        cells.append(Cell(work.task, work.context, len(work.target), len(work.draft), rows))
    device = measure_device(size_of(decoder.target.config, "this"), works[0].context)
    return Report(
        model=decoder.target.name,
        dtype=str(decoder.target.model.dtype).removeprefix("torch."),
        device=str(decoder.target.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        new_tokens=new_tokens,
        repeats=repeats,
        read_bandwidth=bandwidth,
        load_average=[*load, *_load_average()],
        cells=cells,
        engines=[
            _engine(decoder, context, works, cells, device, repeats)
            for context in dict.fromkeys(work.context for work in works)
        ],
    )


def _row(name: str, runs: Sequence[Run]) -> Row:
    return Row(
        method=name,
        ms_per_token=[1000 * run.per_token for run in runs],
        prefill=[run.prefill for run in runs if run.prefill is not None],
        stats=runs[-1].stats,
    )


def _engine(
    decoder: RapidDecoder,
    context: int,
    works: Sequence[Workload],
    cells: Sequence[Cell],
    device: Device,
    repeats: int,
) -> Engine:
    here = [work for work in works if work.context == context]
    first: list[float] = []
    second: list[float] = []
    one = SamplingParams(max_new_tokens=1)
    for _ in range(repeats):
        decoder.clear_cache()
        for work, times in ((here[0], first), (here[-1], second)):
            stats = decoder.generate(work.target, work.draft, sampling=one).stats
            times.append(stats.time_to_first_token or 0.0)
    step, verification = _passes(decoder, here[0].target)
    size = size_of(decoder.target.config, decoder.target.name)
    layers = [m for m in decoder.draft_forward.model.modules() if isinstance(m, BlockLinear)]
    bits = "int4" if any(layer.bits == 4 for layer in layers) else "int8"
    # Methods that the speed model has a row for: it knows nothing of lookup.
    modelled = {
        "rapid without int8, lookup": "self, bf16",
        "rapid without lookup": f"self, {bits}",
    }
    predicted = {
        f"{cell.task}: {method}": _predict(cell, cell.rows[method], drafter, size, device)
        for cell in cells
        for method, drafter in modelled.items()
        if cell.context == context and method in cell.rows
    }
    return Engine(
        context=context,
        step=step,
        verification=verification,
        bytes_read=round(
            size.bytes_read(1, "bf16") + size.kv_bytes_per_token * len(here[0].target)
        ),
        first_question=first,
        second_question=second,
        predicted=predicted,
    )


def _predict(cell: Cell, row: Row, drafter: str, size: ModelSize, device: Device) -> float:
    """What ``rapid-llm plan`` says of this cell, told the acceptance rate that was measured."""
    assert row.stats is not None
    plan = Plan(
        model=size,
        drafter=None,
        device=device,
        context=cell.target_tokens,
        retrieved=cell.draft_tokens,
        acceptance=row.stats.acceptance_rate,
    )
    return next(one.best.speedup for one in plan.rows if one.drafter == drafter)


@torch.inference_mode()
def _passes(decoder: RapidDecoder, prompt: Sequence[int]) -> tuple[list[float], list[float]]:
    """Seconds of passes of 1 and of ``VERIFIED`` tokens after a prompt, in turns."""
    forward = decoder.target
    session = Session(forward, forward.new_cache(len(prompt) + VERIFIED))
    session.prefill(prompt)
    times: dict[int, list[float]] = {1: [], VERIFIED: []}
    for _ in range(20):
        for n, some in times.items():
            tokens = torch.tensor(prompt[-n:], device=forward.device)
            started = time.perf_counter()
            session.extend(tokens).sum().item()
            some.append(time.perf_counter() - started)
            session.rollback(len(prompt))
    return times[1], times[VERIFIED]


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second at which a sum over 1 GiB reads memory: the best of a few."""
    block = torch.ones(2**28, device=device)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        block.sum().item()
        times.append(time.perf_counter() - started)
    return block.nbytes / min(times)


def _load_average() -> list[float]:
    return list(os.getloadavg()[:1]) if hasattr(os, "getloadavg") else []
