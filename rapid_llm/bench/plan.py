"""What the speed model predicts for a model, a context and a device, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import count
from pathlib import PurePath
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rapid_llm.bench.model_size import read_size
from rapid_llm.bench.speed_model import (
    ACCEPTANCE,
    MEMORY_FRACTION,
    Device,
    ModelSize,
    Precision,
    prefill_seconds,
    step_seconds,
)
from rapid_llm.bench.this_device import measure_device
from rapid_llm.errors import InvalidParameterError
from rapid_llm.speculation.schedule import MAX_GAMMA, best_draft, expected_tokens

SENSITIVITY = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Acceptance rates for which each drafter's speedup is shown."""

_MIN_RETRIEVED = 4096
_COMPRESSION = 24


@dataclass(frozen=True)
class Draft:
    """A draft length and what it gains: γ (0 is plain decoding) and the speedup over plain."""

    gamma: int
    speedup: float


@dataclass(frozen=True)
class Row:
    """The prediction for one drafter; plain decoding is the row without (``drafter`` is None).

    Attributes:
        cost: c, a draft step ÷ a plain step; None without a drafter.
        best: the draft length that decodes fastest at the plan's acceptance rate.
        tokens_a_round: E for it.
        seconds_a_token: with it.
        prefill_seconds: of the target's prompt and the drafter's.
        weight_bytes: of both; weights that they share count once.
        kv_bytes: of both caches.
        fits: whether these leave enough of the device's memory; None where that is unknown.
        sensitivity: the best draft for other acceptance rates.
    """

    drafter: str | None
    cost: float | None
    best: Draft
    tokens_a_round: float
    seconds_a_token: float
    prefill_seconds: float
    weight_bytes: int
    kv_bytes: int
    fits: bool | None
    sensitivity: dict[float, Draft]


@dataclass(frozen=True)
class Plan:
    """A case, and what the speed model predicts for it.

    Attributes:
        model: the target.
        drafter: another model to consider beside self-speculation.
        context: tokens the target reads, L.
        retrieved: tokens the drafter reads, S.
        acceptance: a, the probability that a draft token is accepted if those before it were.
    """

    model: ModelSize
    drafter: ModelSize | None
    device: Device
    context: int
    retrieved: int
    acceptance: float

    @property
    def rows(self) -> list[Row]:
        """Plain decoding, self-speculation by bf16, int8 and int4 weights, the other drafter."""
        rows = [
            self._plain(),
            self._row("self, bf16", self.model, "bf16", extra_weights=0),
            *(
                self._row(f"self, {precision}", self.model, precision, extra_weights=extra)
                for precision, extra in self._quantized().items()
            ),
        ]
        if self.drafter is not None:
            label = f"{PurePath(self.drafter.name).name}, bf16"
            extra = self.drafter.weight_bytes
            rows.append(self._row(label, self.drafter, "bf16", extra_weights=extra))
        return rows

    @property
    def warnings(self) -> list[str]:
        """Prompts longer than a model was made for."""
        reads = [(self.model, self.context)]
        if self.drafter is not None:
            reads.append((self.drafter, self.retrieved))
        return [
            f"{size.name} was made for {size.context_window:,} tokens, fewer than the {tokens:,} "
            "it would read"
            for size, tokens in reads
            if tokens > size.context_window
        ]

    @property
    def assumptions(self) -> list[str]:
        """What the predictions rest on."""
        return [
            f"{self.device.name}: {self.device.source}",
            "target and KV in bf16, batch 1; every layer reads its whole cache in every step",
            "each draft token is accepted with the same probability if those before it were; "
            f"γ is the best of 0 to {MAX_GAMMA}",
            "int8 and int4 drafters have kernels that read as fast as bf16's, and come beside the "
            "target's own weights; rapid-llm itself quantizes to int8 on a CPU (to int4 what a "
            "checkpoint has in 4 bits) and to int4 on CUDA",
            f"fits: weights and KV take at most {MEMORY_FRACTION:.0%} of the memory",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Every field and prediction, ready for JSON."""
        fields = asdict(self)
        for name, size in (("model", self.model), ("drafter", self.drafter)):
            if size is not None:
                fields[name]["parameters"] = size.parameters
        return fields | {
            "rows": [asdict(row) for row in self.rows],
            "warnings": self.warnings,
            "assumptions": self.assumptions,
        }

    def _quantized(self) -> dict[Precision, int]:
        precisions: tuple[Precision, ...] = ("int8", "int4")
        return {precision: self.model.quantized_bytes(precision) for precision in precisions}

    def _plain(self) -> Row:
        weights = self.model.weight_bytes
        kv = self.model.kv_bytes_per_token * self.context
        return Row(
            drafter=None,
            cost=None,
            best=Draft(0, 1),
            tokens_a_round=1,
            seconds_a_token=step_seconds(self.model, self.device, self.context),
            prefill_seconds=prefill_seconds(self.model, self.device, self.context),
            weight_bytes=weights,
            kv_bytes=kv,
            fits=self._fits(weights + kv),
            sensitivity={},
        )

    def _row(
        self, label: str, drafter: ModelSize, precision: Precision, *, extra_weights: int
    ) -> Row:
        plain = self._plain()
        step = plain.seconds_a_token
        draft = step_seconds(drafter, self.device, self.retrieved, precision=precision)
        verify = [
            step_seconds(self.model, self.device, self.context, tokens=gamma + 1)
            for gamma in range(1, MAX_GAMMA + 1)
        ]

        def best(acceptance: float) -> Draft:
            tokens = (expected_tokens(acceptance, gamma) for gamma in count(1))
            return Draft(*best_draft(tokens, step, draft, verify))

        chosen = best(self.acceptance)
        weights = plain.weight_bytes + extra_weights
        kv = plain.kv_bytes + drafter.kv_bytes_per_token * self.retrieved
        drafter_prefill = prefill_seconds(drafter, self.device, self.retrieved)
        return Row(
            drafter=label,
            cost=draft / step,
            best=chosen,
            tokens_a_round=expected_tokens(self.acceptance, chosen.gamma),
            seconds_a_token=step / chosen.speedup,
            prefill_seconds=plain.prefill_seconds + drafter_prefill,
            weight_bytes=weights,
            kv_bytes=kv,
            fits=self._fits(weights + kv),
            sensitivity={acceptance: best(acceptance) for acceptance in SENSITIVITY},
        )

    def _fits(self, required: int) -> bool | None:
        memory = self.device.memory
        return None if memory is None else required <= MEMORY_FRACTION * memory


def make_plan(
    model: str,
    context: int,
    *,
    retrieved: int | None = None,
    drafter: str | None = None,
    acceptance: float = ACCEPTANCE,
    device: Device | None = None,
) -> Plan:
    """A plan from names: configs are read, weights are not.

    Args:
        model: the target: a hub id, a folder, a ``.gguf`` file, or ``smollm2-135m``.
        context: tokens the target reads.
        retrieved: tokens the drafter reads; None is :func:`paper_retrieved`.
        drafter: another model, smaller or larger, named likewise.
        acceptance: in [0, 1].
        device: None measures this machine.

    Raises:
        InvalidParameterError: a number is out of range.
        ModelError: a model cannot be found or is not supported.
        MissingDependencyError: the packaged model is not installed.
    """
    if context < 1:
        raise InvalidParameterError(f"context={context} is not allowed: it must be at least 1")
    if retrieved is not None and not 1 <= retrieved <= context:
        raise InvalidParameterError(
            f"retrieved={retrieved} is not allowed: it must be from 1 to context={context}"
        )
    if not 0 <= acceptance <= 1:
        raise InvalidParameterError(
            f"acceptance={acceptance} is not allowed: it must be from 0 to 1"
        )
    size = read_size(model)
    return Plan(
        model=size,
        drafter=None if drafter is None else read_size(drafter),
        device=device or measure_device(size, context),
        context=context,
        retrieved=retrieved or paper_retrieved(context),
        acceptance=acceptance,
    )


def paper_retrieved(context: int) -> int:
    """Tokens the paper retrieves: the larger of 4,096 and L/24, and never more than L."""
    return min(context, max(_MIN_RETRIEVED, context // _COMPRESSION))


# --- what is shown ---------------------------------------------------------------------------


def heading(plan: Plan) -> str:
    """The model, how much of it there is, and where and on what it would run."""
    size = plan.model
    active = f", {_count(size.active_parameters)} active" if size.experts else ""
    return (
        f"{size.name} ({_count(size.parameters)} parameters{active}), {plan.device.name}: "
        f"{plan.context:,} tokens, {plan.retrieved:,} retrieved, acceptance rate "
        f"{plan.acceptance:g}"
    )


def speed_table(plan: Plan) -> Table:
    """A line a drafter: what a step costs, and what decoding gains."""
    table = _table("drafter", "c", "γ", "tokens\na round", "ms\na token", "speedup", "prefill\ns")
    for row in plan.rows:
        table.add_row(
            row.drafter or "none (plain)",
            "–" if row.cost is None else f"{row.cost:.2f}",
            str(row.best.gamma),
            f"{row.tokens_a_round:.1f}",
            f"{1000 * row.seconds_a_token:.1f}",
            f"{row.best.speedup:.2f}",
            f"{row.prefill_seconds:.1f}",
        )
    return table


def sensitivity_table(plan: Plan) -> Table:
    """A line a drafter: the speedup at other acceptance rates, each with its best γ."""
    table = _table("speedup (γ) at a =", *(f"{acceptance:g}" for acceptance in SENSITIVITY))
    for row in plan.rows:
        if row.drafter is not None:
            cells = (f"{best.speedup:.2f} ({best.gamma})" for best in row.sensitivity.values())
            table.add_row(row.drafter, *cells)
    return table


def memory_table(plan: Plan) -> Table:
    """A line a drafter: what target and drafter take together."""
    memory = plan.device.memory
    limit = "unknown" if memory is None else f"{memory / 1e9:.0f} GB"
    table = _table("memory, GB", "weights", "KV", "all", f"fits ({limit})")
    for row in plan.rows:
        table.add_row(
            row.drafter or "none (plain)",
            f"{row.weight_bytes / 1e9:.2f}",
            f"{row.kv_bytes / 1e9:.2f}",
            f"{(row.weight_bytes + row.kv_bytes) / 1e9:.2f}",
            {True: "yes", False: "no", None: "?"}[row.fits],
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=SIMPLE_HEAD)
    for other in others:
        table.add_column(other, justify="right")
    return table


def _count(parameters: float) -> str:
    billions = parameters / 1e9
    return f"{billions:.2f}B" if billions >= 1 else f"{1000 * billions:.1f}M"
