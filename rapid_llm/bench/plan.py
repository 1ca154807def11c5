"""Predicted speed and memory of a model for a context length and a device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import count
from pathlib import PurePath
from typing import Any

from rapid_llm.bench.known_models import PAPER_PAIRS
from rapid_llm.bench.memory import Spread, Tier, spreads, tiers
from rapid_llm.bench.shapes import read_size
from rapid_llm.bench.speed_model import (
    ACCEPTANCE,
    MEMORY_FRACTION,
    Device,
    ModelSize,
    Precision,
    pass_seconds,
    prefill_flops,
    require,
)
from rapid_llm.bench.this_device import measure_device
from rapid_llm.speculation.schedule import MAX_GAMMA, best_draft, expected_tokens

SENSITIVITY = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Acceptance rates for which each drafter's speedup is shown."""


@dataclass(frozen=True)
class Draft:
    """A draft length γ (0 is plain decoding) and its speedup over plain decoding."""

    gamma: int
    speedup: float


@dataclass(frozen=True)
class Row:
    """Predictions for one drafter.

    Attributes:
        drafter: name of the drafter; None for plain decoding.
        cost: c, time of a draft step ÷ time of a plain step.
        best: fastest draft length at the plan's acceptance rate.
        tokens_a_round: E at that length.
        seconds_a_token: seconds per token at that length.
        prefill_seconds: seconds of reading both prompts.
        weight_bytes: bytes of both models' weights; shared weights count once.
        kv_bytes: bytes of both KV caches.
        fits: whether weights and KV leave room for activations; None where the memory is unknown.
        sensitivity: fastest draft lengths at other acceptance rates.
        spreads: memory on several devices.
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
    spreads: list[Spread]


@dataclass(frozen=True)
class Plan:
    """A model, context length and device, with the predictions of the speed model.

    Attributes:
        model: the target.
        drafter: another model to draft with, in addition to self-speculation; None for none.
        device: the device.
        context: L, tokens that the target reads.
        retrieval_tokens: S, tokens that the drafter reads.
        acceptance: a, probability that a drafted token is accepted if those before it were.
    """

    model: ModelSize
    drafter: ModelSize | None
    device: Device
    context: int
    retrieval_tokens: int
    acceptance: float

    @property
    def rows(self) -> list[Row]:
        """Rows for plain decoding, self-speculation by weight format, and the other drafter."""
        rows = [self._row(None), self._row(f"self, {self.device.dtype}", self.model)]
        for bits in self.device.quantizations:
            extra = self.model.quantized_bytes(bits)
            rows.append(self._row(f"self, {bits[:4]}", self.model, bits, extra))
        if self.drafter is not None:
            name, extra = PurePath(self.drafter.name).name, self.drafter.weight_bytes
            rows.append(self._row(f"{name}, {self.device.dtype}", self.drafter, extra=extra))
        return rows

    def _row(
        self, label: str | None, drafter: ModelSize | None = None, precision: Precision = "bf16",
        extra: int = 0,
    ) -> Row:  # fmt: skip
        """The row of a drafter, whose weights take ``extra`` bytes beside the target's."""
        device, step = self.device, self._round(1)
        weights = self.model.weight_bytes + extra
        kv = self.model.kv_bytes_per_token * self.context
        prefill = prefill_flops(self.model, self.context) / device.flops
        draft, verify = 0.0, []
        if drafter is not None:
            kv += drafter.kv_bytes_per_token * self.retrieval_tokens
            prefill += prefill_flops(drafter, self.retrieval_tokens) / device.flops
            draft = pass_seconds(drafter, device, self.retrieval_tokens, precision=precision)
            verify = [self._round(gamma + 1) for gamma in range(1, MAX_GAMMA + 1)]

        def best(acceptance: float) -> Draft:
            tokens = (expected_tokens(acceptance, gamma) for gamma in count(1))
            return Draft(*best_draft(tokens, step, draft, verify))

        chosen, memory = best(self.acceptance), device.memory
        return Row(
            drafter=label,
            cost=draft / step if drafter else None,
            best=chosen,
            tokens_a_round=expected_tokens(self.acceptance, chosen.gamma),
            seconds_a_token=step / chosen.speedup,
            prefill_seconds=prefill,
            weight_bytes=weights,
            kv_bytes=kv,
            fits=None if memory is None else weights + kv <= MEMORY_FRACTION * memory,
            sensitivity={a: best(a) for a in SENSITIVITY} if drafter else {},
            spreads=self._spreads(drafter, extra if precision != "bf16" else 0),
        )

    def _spreads(self, drafter: ModelSize | None, copied: int) -> list[Spread]:
        """Memory on several devices, with a quantized copy of ``copied`` bytes."""
        models = [(self.model, self.context)]
        caches: list[tuple[ModelSize, int]] = []
        if drafter is not None:
            own = caches if drafter is self.model else models
            own.append((drafter, self.retrieval_tokens))
        return spreads(models, caches, self.device, copied)

    @property
    def tiers(self) -> list[Tier]:
        """Tiers of kept KV, for documents as long as the context."""
        return tiers(self.model, self.context, self.device)

    def _round(self, tokens: int) -> float:
        """Seconds of a round without its drafts, in which the target reads ``tokens`` tokens."""
        seconds = pass_seconds(self.model, self.device, self.context, tokens=tokens)
        return seconds + self.device.round_seconds

    @property
    def warnings(self) -> list[str]:
        """Warnings about prompts longer than a model's context window."""
        reads = [(self.model, self.context), (self.drafter, self.retrieval_tokens)]
        return [
            f"{size.name} was made for {size.context_window:,} tokens, fewer than the {tokens:,} "
            "it would read"
            for size, tokens in reads
            if size is not None and tokens > size.context_window
        ]

    @property
    def assumptions(self) -> list[str]:
        """Assumptions of the predictions, in sentences."""
        return [
            f"{self.device.name}, {self.device.source}: {self.device.rates}",
            f"target and KV in {self.device.dtype}, batch 1; every layer reads its whole cache in "
            "every step",
            "each draft token is accepted with the same probability if those before it were; "
            f"γ is the best of 0 to {MAX_GAMMA}",
            "a drafter of few bits comes beside the target's own weights; a CPU takes int8 (int4 "
            "where the checkpoint has 4 bits), which it reads as fast as bf16, CUDA int4 from "
            "Ampere on",
            f"fits: weights and KV take at most {MEMORY_FRACTION:.0%} of the memory",
            "on several devices: what the fullest of equal ones holds. With a device map they take "
            "turns, so that a token takes what it takes on one; tensor parallel is not timed here",
            "kept KV: a device's is a quarter of its memory; it comes back from the host at 55 "
            "GB/s, which an H100 reached, and from disk at 3 GB/s, which is assumed",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Every field and prediction, ready for JSON."""
        said = {"warnings": self.warnings, "assumptions": self.assumptions}
        kept = {"tiers": [asdict(tier) for tier in self.tiers]}
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]} | kept | said


def make_plan(
    model: str, context: int, *, retrieval_tokens: int | None = None, drafter: str | None = None,
    acceptance: float = ACCEPTANCE, device: Device | None = None,
) -> Plan:  # fmt: skip
    """A plan from names: configs are read, weights are not.

    Args:
        model: name of the target, as :func:`rapid_llm.models.load_model` takes it.
        context: tokens that the target reads.
        retrieval_tokens: tokens that the drafter reads; None is :func:`paper_retrieved`.
        drafter: name of another model to draft with; None for self-speculation only.
        acceptance: acceptance rate a.
        device: the device; None measures this machine.

    Raises:
        InvalidParameterError: a number is out of range.
        ModelError: a model cannot be found or is not supported.
        MissingDependencyError: the packaged model is not installed.
    """
    reads = paper_retrieved(context) if retrieval_tokens is None else retrieval_tokens
    require(context >= 1, "context", context, "at least 1")
    require(1 <= reads <= context, "retrieval_tokens", reads, f"from 1 to context={context}")
    require(0 <= acceptance <= 1, "acceptance", acceptance, "from 0 to 1")
    size = read_size(model)
    other = None if drafter is None else read_size(drafter)
    return Plan(size, other, device or measure_device(size, context), context, reads, acceptance)


def paper_retrieved(context: int) -> int:
    """Tokens that the paper retrieves: the larger of 4,096 and L/24, but at most L."""
    return min(context, max(4096, context // 24))


def paper_plans(context: int, device: Device) -> list[Plan]:
    """Plans of the paper's pairs of models for a context of ``context`` tokens.

    Raises:
        InvalidParameterError: the context is out of range.
    """
    return [
        make_plan(model, context, drafter=drafter, device=device) for model, drafter in PAPER_PAIRS
    ]
