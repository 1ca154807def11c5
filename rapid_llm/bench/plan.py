"""Predicted speed and memory of a model for a context length and a device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import PurePath

from rapid_llm.bench.speed_model import (
    ACCEPTANCE,
    MEMORY_FRACTION,
    Device,
    pass_seconds,
    prefill_flops,
    require,
)
from rapid_llm.bench.this_device import measure_device
from rapid_llm.shapes import ModelSize, Precision, read_size
from rapid_llm.speculation.schedule import MAX_GAMMA, best_draft, expected_tokens

SENSITIVITY = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Acceptance rates for which each drafter's speedup is shown."""

DEVICE_COUNTS = (1, 2, 4, 8)
"""Numbers of devices for which the memory is shown."""

_KEPT = 0.25  # share of a device's memory for kept KV: the default of kv_cache_bytes
# Units of memory, and bytes/s at which KV is restored: from pinned host memory as measured on an
# H100 (PCIe 5), from an NVMe disk as assumed.
_UNITS = (("host", 100 * 10**9, 55e9), ("disk", 10**12, 3e9))


@dataclass(frozen=True)
class Spread:
    """A number of equal devices, and the memory used on the fullest of them."""

    devices: int
    mapped: int  # bytes with a device map, where layers are on one device each
    mapped_fits: bool | None  # whether it leaves room for activations; None: unknown memory
    sharded: int | None  # bytes in tensor parallel; None where the models' heads do not divide
    sharded_fits: bool | None


@dataclass(frozen=True)
class Tier:
    """A tier in which the KV of documents is kept, so that the next question need not read them."""

    name: str  # device, host or disk
    nbytes: int  # a device's default budget, a unit of host memory or of disk
    documents: int  # number of documents whose KV fits
    seconds: float  # time to restore the KV of one document to the device


@dataclass(frozen=True)
class Draft:
    """A draft length γ (0 is plain decoding) and its speedup over plain decoding."""

    gamma: int
    speedup: float


@dataclass(frozen=True)
class Row:
    """Predictions for one drafter."""

    drafter: str | None  # name; None for plain decoding
    cost: float | None  # c, time of a draft step ÷ time of a plain step
    best: Draft  # fastest draft length at the plan's acceptance rate
    tokens_a_round: float  # E at that length
    seconds_a_token: float  # at that length
    prefill_seconds: float  # of reading both prompts
    weight_bytes: int  # of both models; shared weights count once
    kv_bytes: int  # of both KV caches
    fits: bool | None  # whether both leave room for activations; None: unknown memory
    sensitivity: dict[float, Draft]  # fastest draft lengths at other acceptance rates
    spreads: list[Spread]  # memory on several devices


@dataclass(frozen=True)
class Plan:
    """A model, context length and device, with the predictions of the speed model."""

    model: ModelSize  # the target
    drafter: ModelSize | None  # another model to draft with, in addition to self-speculation
    device: Device
    context: int  # L, tokens that the target reads
    retrieval_tokens: int  # S, tokens that the drafter reads
    acceptance: float  # a, probability that a drafted token is accepted if those before it were

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

        chosen = best(self.acceptance)
        return Row(
            drafter=label,
            cost=draft / step if drafter else None,
            best=chosen,
            tokens_a_round=expected_tokens(self.acceptance, chosen.gamma),
            seconds_a_token=step / chosen.speedup,
            prefill_seconds=prefill,
            weight_bytes=weights,
            kv_bytes=kv,
            fits=self._fits(weights + kv),
            sensitivity={a: best(a) for a in SENSITIVITY} if drafter else {},
            spreads=self._spreads(drafter, extra if precision != "bf16" else 0),
        )

    def _spreads(self, drafter: ModelSize | None, copied: int) -> list[Spread]:
        """Memory on several devices; a quantized copy of ``copied`` bytes is made on one only."""
        models = [(self.model, self.context)]
        if drafter is self.model:  # whose second cache lies as its first
            models = [(self.model, self.context + self.retrieval_tokens)]
        elif drafter is not None:
            models.append((drafter, self.retrieval_tokens))
        found = []
        for devices in DEVICE_COUNTS[:1] if copied else DEVICE_COUNTS:
            mapped = copied + sum(size.mapped_bytes(devices, tokens) for size, tokens in models)
            shards = [size.sharded_bytes(devices, tokens) for size, tokens in models]
            known = [share for share in shards if share is not None]
            sharded = copied + sum(known) if known == shards else None
            found.append(Spread(devices, mapped, self._fits(mapped), sharded, self._fits(sharded)))
        return found

    def _fits(self, nbytes: int | None) -> bool | None:
        """Whether so many bytes leave room for activations; None where one is unknown."""
        memory = self.device.memory
        return None if nbytes is None or memory is None else nbytes <= MEMORY_FRACTION * memory

    def _round(self, tokens: int) -> float:
        """Seconds of a round without its drafts, in which the target reads ``tokens`` tokens."""
        seconds = pass_seconds(self.model, self.device, self.context, tokens=tokens)
        return seconds + self.device.round_seconds

    @property
    def tiers(self) -> list[Tier]:
        """Tiers of kept KV, for documents as long as the context; a CPU has no separate host's."""
        kv, found = self.model.kv_bytes_per_token * self.context, []
        if self.device.memory is not None:
            budget = round(_KEPT * self.device.memory)
            found.append(Tier("device", budget, budget // kv, 0.0))
        units = _UNITS if self.device.is_gpu else _UNITS[1:]
        return found + [Tier(name, unit, unit // kv, kv / rate) for name, unit, rate in units]


def make_plan(
    model: str, context: int, *, retrieval_tokens: int | None = None, drafter: str | None = None,
    acceptance: float = ACCEPTANCE, device: Device | None = None,
) -> Plan:  # fmt: skip
    """A plan from names, as :func:`rapid_llm.models.load_model` takes them; no weights are read.

    Without ``drafter`` the target drafts for itself only; ``retrieval_tokens`` are those of
    :func:`paper_retrieved` by default. Without ``device`` this machine is measured.

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
