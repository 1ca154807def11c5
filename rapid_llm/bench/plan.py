"""Plan: the predicted speed and memory of a model, a context length and a device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import count
from pathlib import PurePath
from typing import Any

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
    """A draft length and what it gains: γ (0 is plain decoding) and the speedup over plain."""

    gamma: int
    speedup: float


@dataclass(frozen=True)
class Row:
    """The prediction for one drafter."""

    drafter: str | None  # None is plain decoding
    cost: float | None  # c, a draft step ÷ a plain step
    best: Draft  # the draft length that decodes fastest at the plan's acceptance rate
    tokens_a_round: float  # E for it
    seconds_a_token: float
    prefill_seconds: float  # of the target's prompt and the drafter's
    weight_bytes: int  # of both models; weights that they share count once
    kv_bytes: int  # of both caches
    fits: bool | None  # whether these leave enough of the memory; None where that is unknown
    sensitivity: dict[float, Draft]  # the best draft for other acceptance rates


@dataclass(frozen=True)
class Plan:
    """A case, and what the speed model predicts for it."""

    model: ModelSize  # the target
    drafter: ModelSize | None  # another model to consider beside self-speculation
    device: Device
    context: int  # tokens the target reads, L
    retrieval_tokens: int  # tokens the drafter reads, S
    acceptance: float  # a, the probability that a draft token is accepted if those before it were

    @property
    def rows(self) -> list[Row]:
        """Plain decoding, self-speculation by 16 and the device's few bits, another drafter."""
        rows = [self._row(None), self._row(f"self, {self.device.dtype}", self.model)]
        for bits in self.device.few_bits:
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
        """``extra``: bytes of weights that the target has not."""
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
        )

    def _round(self, tokens: int) -> float:
        """Seconds of a round but for its drafts: the target reads so many tokens."""
        seconds = pass_seconds(self.model, self.device, self.context, tokens=tokens)
        return seconds + self.device.round_seconds

    @property
    def warnings(self) -> list[str]:
        """Prompts longer than a model was made for."""
        reads = [(self.model, self.context), (self.drafter, self.retrieval_tokens)]
        return [
            f"{size.name} was made for {size.context_window:,} tokens, fewer than the {tokens:,} "
            "it would read"
            for size, tokens in reads
            if size is not None and tokens > size.context_window
        ]

    @property
    def assumptions(self) -> list[str]:
        """What the predictions rest on."""
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
        ]

    def as_dict(self) -> dict[str, Any]:
        """Every field and prediction, ready for JSON."""
        said = {"warnings": self.warnings, "assumptions": self.assumptions}
        return asdict(self) | {"rows": [asdict(row) for row in self.rows]} | said


def make_plan(
    model: str, context: int, *, retrieval_tokens: int | None = None, drafter: str | None = None,
    acceptance: float = ACCEPTANCE, device: Device | None = None,
) -> Plan:  # fmt: skip
    """A plan from names: configs are read, weights are not.

    Args:
        model: the target, as :func:`rapid_llm.models.load_model` takes it; ``drafter`` likewise.
        retrieval_tokens: tokens the drafter reads; None is :func:`paper_retrieved`.
        device: None measures this machine.

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
    """Tokens the paper retrieves: the larger of 4,096 and L/24, and never more than L."""
    return min(context, max(4096, context // 24))
