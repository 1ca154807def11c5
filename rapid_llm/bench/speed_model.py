"""Predict the time of a pass and of a round of speculation from sizes alone, without torch.

A pass is modelled by its roofline (Williams et al., 2009). On a GPU its matrix products take as
long as reading their bytes or doing their arithmetic, whichever is longer; on a CPU both times add
up (11 tokens take half as long again as 1). Each layer adds a constant. A round drafts γ tokens,
verifies γ+1 in one pass, and waits for the host once; its expected number of tokens is that of
Leviathan et al. (2023).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rapid_llm.errors import InvalidParameterError
from rapid_llm.folders import packaged_text

if TYPE_CHECKING:
    from rapid_llm.shapes import ModelSize, Precision

ACCEPTANCE = 0.8
"""Default acceptance rate a. Self-speculation of a small model on a text of 7.6K tokens at γ = 10
yielded 4 tokens per round at temperature 1 and 5 to 6 greedily, which are a = 0.76 and 0.83 to
0.87."""

# Measured on an H100 with an 8B model (cookbook/results/gpu), and assumed for other GPUs.
_WEIGHTS = 0.85  # share of the data sheet's memory bandwidth in products of few tokens
_KV = 0.93  # share of that bandwidth in attention over long contexts
_INT4 = 0.66  # rate of reading 4-bit weights ÷ that of bf16 (tinygemm, one token)
_COMPUTE = 0.57  # share of the data sheet's matrix throughput in a prefill
_LAYER = 25e-6  # seconds of a layer's norms, rotation and activation, and gaps between kernels
_ROUND = 0.95e-3  # seconds of a round on the host, which waits once for the device

MEMORY_FRACTION = 0.9
"""Share of a device's memory for weights and KV; the rest is for activations (assumed)."""


def require(ok: bool, name: str, value: object, limit: str) -> None:
    """Raise InvalidParameterError, which names a value and its limit, unless ``ok``."""
    if not ok:
        raise InvalidParameterError(f"{name}={value} is not allowed: it must be {limit}")


@dataclass(frozen=True)
class Device:
    """Rates that a device achieves."""

    name: str
    bandwidth: float  # bytes/s of weights read by matrix-vector products
    kv_bandwidth: float  # bytes/s of keys and values read by attention
    flops: float  # operations/s of bf16 matrix products in a prefill
    pass_flops: float  # operations/s in passes of few tokens
    memory: int | None  # bytes; None if unknown
    layer_seconds: float  # constant time of a layer in a pass
    round_seconds: float  # time of a round or plain step in addition to its passes
    is_gpu: bool
    source: str  # source of the numbers
    dtype: Literal["bf16", "fp16"] = "bf16"  # of KV and of weights that are not quantized

    @property
    def quantizations(self) -> tuple[Precision, ...]:
        """Formats of a drafter's quantized weights; int4 on a GPU needs bfloat16."""
        if not self.is_gpu:
            return "int8", "int4"
        return ("int4g64",) if self.dtype == "bf16" else ()


def described_device(
    bandwidth: float,
    tflops: float,
    memory: float | None = None,
    *,
    name: str | None = None,
    dtype: Literal["bf16", "fp16"] = "bf16",
) -> Device:
    """A GPU described by its data sheet: memory bandwidth in GB/s, dense matrix throughput, GB.

    ``memory`` is None if unknown, ``name`` for a GPU that has no data sheet here.

    Raises:
        InvalidParameterError: a number is not positive, or not finite.
    """
    for what, value in (("bandwidth", bandwidth), ("tflops", tflops), ("memory", memory)):
        ok = value is None or (value > 0 and math.isfinite(value))
        require(ok, what, value, "more than 0, and finite")
    compute = tflops * 1e12 * _COMPUTE
    known_from = "the data sheet's" if name else "the given"
    return Device(
        name=name or ("a GPU" if memory is None else f"a GPU of {memory:g} GB"),
        bandwidth=bandwidth * 1e9 * _WEIGHTS,
        kv_bandwidth=bandwidth * 1e9 * _KV,
        flops=compute,
        pass_flops=compute,
        memory=None if memory is None else round(memory * 1e9),
        layer_seconds=_LAYER,
        round_seconds=_ROUND,
        is_gpu=True,
        source=f"of {known_from} {bandwidth:,.0f} GB/s and "
        f"{tflops:,.0f} TFLOP/s (dense {dtype}) the shares that were measured on an H100",
        dtype=dtype,
    )


# NVIDIA's data sheets, without sparsity: "H100", "H200", "A100", "L40S", "L4", "A10G", "T4"; of the
# B200, an eighth of "DGX B200" (1,440 GB, 64 TB/s) and "HGX B200" (18 PFLOP/s). Of the RTX cards,
# the tables of the Ada and the GA102 white paper, with float32 accumulation.
_SHEETS = json.loads(packaged_text("devices.json"))
DEVICES = {key: described_device(**sheet) for key, sheet in _SHEETS.items()}
"""GPUs by the names that ``--device`` takes. A T4 has no bfloat16."""


def named_device(name: str) -> Device:
    """A device of :data:`DEVICES`.

    Raises:
        InvalidParameterError: the name is unknown.
    """
    if name not in DEVICES:
        raise InvalidParameterError(
            f"device={name!r} is unknown; use 'this' to measure this machine, "
            f"{', '.join(map(repr, DEVICES))}, or describe it by bandwidth and tflops"
        )
    return DEVICES[name]


def pass_seconds(
    size: ModelSize, device: Device, length: int, *, tokens: int = 1, precision: Precision = "bf16"
) -> float:
    """Seconds of a pass over ``tokens`` tokens after ``length`` cached ones.

    Every layer is assumed to read the whole cache, even with a sliding window.
    """
    slower = _INT4 if device.is_gpu and precision != "bf16" else 1
    reading = size.bytes_read(tokens, precision) / (device.bandwidth * slower)
    reading += size.kv_bytes_per_token * length / device.kv_bandwidth
    computing = flops(size, tokens, tokens * length) / device.pass_flops
    matrices = max(reading, computing) if device.is_gpu else reading + computing
    return matrices + size.layers * device.layer_seconds


def prefill_flops(size: ModelSize, length: int) -> float:
    """Operations of the prefill of a prompt of ``length`` tokens.

    Query i attends to i keys, length²/2 pairs in all. Logits are computed for the last token only.
    """
    return flops(size, length, length**2 / 2) - 2 * size.head * (length - 1)


def flops(size: ModelSize, tokens: int, pairs: float) -> float:
    """Operations of a pass over ``tokens`` tokens with ``pairs`` pairs of query and key.

    There are two per weight and token, and four per layer, query head, pair and dimension.
    """
    width = size.heads * size.head_dim
    return 2 * size.active_parameters * tokens + 4 * pairs * size.layers * width
