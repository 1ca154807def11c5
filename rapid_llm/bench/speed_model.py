"""Predict the time of a pass and of a round of speculation from sizes alone, without torch.

A pass is modelled by its roofline (Williams et al., 2009). On a GPU its matrix products take as
long as reading their bytes or doing their arithmetic, whichever is longer; on a CPU these do not
overlap, and add up (11 tokens take half as long again as 1). The rest of each layer adds to that. A
round drafts γ tokens, verifies γ+1 in one pass, and waits for the host once; its yield is that of
Leviathan et al. (2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rapid_llm.errors import InvalidParameterError

Precision = Literal["bf16", "int8", "int4", "int4g64"]
"""``int4`` as GGUF files and our drafter on a CPU have it, ``int4g64`` as on CUDA."""

ACCEPTANCE = 0.8
"""The acceptance rate a, where none is given. Self-speculation of a small model on a text of 7.6K
tokens at γ = 10 yielded 4 tokens a round at temperature 1 and 5 to 6 greedily, which are a = 0.76
and 0.83 to 0.87."""

# What passes on an H100 reached: the 8B model of cookbook/results/gpu; assumed of other GPUs.
_WEIGHTS = 0.85  # of a data sheet's memory bandwidth, by the products of few tokens
_KV = 0.93  # of it, by attention over long contexts
_INT4 = 0.66  # of the weights' rate in bf16, by 4-bit weights (tinygemm, one token)
_COMPUTE = 0.57  # of a data sheet's matrix throughput, by a prefill
_LAYER = 25e-6  # seconds of a layer's norms, rotation and activation, and gaps between kernels
_ROUND = 0.95e-3  # seconds of a round on the host, which waits once for the device

MEMORY_FRACTION = 0.9
"""Of a device's memory, what weights and KV may fill; the rest is for activations (assumed)."""

_ITEMSIZE = 2  # bytes of a 16-bit number: KV, scales, and whatever is not quantized
# Bytes of a weight of the layers, and of the output layer. 32 weights share a scale of 16 bits, and
# in 4 bits their smallest weight too, where the output layer stays int8; on CUDA 64 do.
_BYTES: dict[Precision, tuple[float, float]] = {
    "bf16": (2, 2),
    "int8": (1 + 2 / 32, 1 + 2 / 32),
    "int4": (0.5 + 4 / 32, 1 + 2 / 32),
    "int4g64": (0.5 + 4 / 64, 0.5 + 4 / 64),
}


def require(ok: bool, name: str, value: object, limit: str) -> None:
    """Raises InvalidParameterError unless ok."""
    if not ok:
        raise InvalidParameterError(f"{name}={value} is not allowed: it must be {limit}")


@dataclass(frozen=True)
class ModelSize:
    """What the speed model needs to know of a model; all counts are of parameters."""

    name: str
    lookup: int  # the input embedding, of which a pass reads some rows only; 0 if it is tied
    head: int  # the output layer, tied or not; part of the matrices
    matrices: int  # what every pass reads in full and quantization shrinks, experts apart
    experts: int  # all routed experts of all layers
    expert_share: float  # experts a token is routed to ÷ experts of a layer
    vectors: int  # norms and biases, never quantized
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    context_window: int  # positions that the model was made for

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        return self.lookup + self.matrices + self.experts + self.vectors

    @property
    def active_parameters(self) -> float:
        """Those that one token is multiplied with."""
        return self.matrices + self.experts * self.expert_share

    @property
    def kv_bytes_per_token(self) -> int:
        """k = layers · 2 · kv_heads · head_dim · itemsize, in bf16."""
        return self.layers * 2 * self.kv_heads * self.head_dim * _ITEMSIZE

    @property
    def weight_bytes(self) -> int:
        """All weights in bf16."""
        return self.parameters * _ITEMSIZE

    def quantized_bytes(self, precision: Precision) -> int:
        """What a copy of the matrices in few bits takes beside the model's own weights."""
        return round(self._matrix_bytes(self.experts, precision))

    def bytes_read(self, tokens: int, precision: Precision) -> float:
        """Weight bytes that a pass over ``tokens`` reads: W, for one token.

        Tokens are taken to choose their experts independently and evenly, so n of them need the
        share 1 − (1 − share)ⁿ of the experts.
        """
        experts = self.experts * (1 - (1 - self.expert_share) ** tokens)
        return self._matrix_bytes(experts, precision) + self.vectors * _ITEMSIZE

    def _matrix_bytes(self, experts: float, precision: Precision) -> float:
        """Bytes of the matrices and so many of the experts' weights."""
        layers, head = _BYTES[precision]
        return self.head * head + (self.matrices - self.head + experts) * layers


@dataclass(frozen=True)
class Device:
    """What a device achieves, in bytes, seconds and floating-point operations."""

    name: str
    bandwidth: float  # bytes/s of weights read by a matrix-vector product
    kv_bandwidth: float  # bytes/s of keys and values read by attention
    flops: float  # a second, in bf16 matrix products of a prefill
    pass_flops: float  # a second, in passes of few tokens
    memory: int | None  # bytes; None where it cannot be told
    layer_seconds: float  # of a layer of a pass in which there is next to nothing to compute
    round_seconds: float  # of a round or a plain step, beside its passes
    is_gpu: bool
    source: str  # where the numbers come from
    dtype: Literal["bf16", "fp16"] = "bf16"  # of weights that are not quantized, and of KV

    @property
    def few_bits(self) -> tuple[Precision, ...]:
        """How a drafter's weights may be quantized there; 4 bits on a GPU need bfloat16."""
        if not self.is_gpu:
            return "int8", "int4"
        return ("int4g64",) if self.dtype == "bf16" else ()

    @property
    def rates(self) -> str:
        """What it achieves, in words."""
        return (
            f"weights are read at {self.bandwidth / 1e9:,.1f} GB/s, KV at "
            f"{self.kv_bandwidth / 1e9:,.1f}; {self.flops / 1e12:,.2f} TFLOP/s in a prefill, "
            f"{self.pass_flops / 1e12:,.2f} in passes of few tokens; beside, "
            f"{self.layer_seconds * 1e6:.0f} µs a layer, "
            f"{self.round_seconds * 1e3:.2f} ms a round"
        )


def _gpu(
    name: str,
    bandwidth: float,
    flops: float,
    memory: int | None,
    *,
    dtype: Literal["bf16", "fp16"] = "bf16",
    known_from: str = "the data sheet's",
) -> Device:
    return Device(
        name=name,
        bandwidth=bandwidth * _WEIGHTS,
        kv_bandwidth=bandwidth * _KV,
        flops=flops * _COMPUTE,
        pass_flops=flops * _COMPUTE,
        memory=memory,
        layer_seconds=_LAYER,
        round_seconds=_ROUND,
        is_gpu=True,
        source=f"of {known_from} {bandwidth / 1e9:,.0f} GB/s and {flops / 1e12:,.0f} TFLOP/s "
        f"(dense {dtype}) the shares that were measured on an H100",
        dtype=dtype,
    )


# NVIDIA's data sheets, without sparsity: "H100", "H200", "A100", "L40S", "L4", "A10G", "T4"; of the
# B200, an eighth of "DGX B200" (1,440 GB, 64 TB/s) and "HGX B200" (18 PFLOP/s). Of the RTX cards,
# the tables of the Ada and the GA102 white paper, with float32 accumulation.
DEVICES = {
    "b200": _gpu("B200 180 GB", 8e12, 2250e12, 180 * 10**9),
    "h200": _gpu("H200 SXM 141 GB", 4.8e12, 989e12, 141 * 10**9),
    "h100": _gpu("H100 SXM 80 GB", 3.35e12, 989e12, 80 * 10**9),
    "a100": _gpu("A100 SXM 80 GB", 2.039e12, 312e12, 80 * 10**9),
    "l40s": _gpu("L40S 48 GB", 864e9, 362e12, 48 * 10**9),
    "l4": _gpu("L4 24 GB", 300e9, 121e12, 24 * 10**9),
    "a10g": _gpu("A10G 24 GB", 600e9, 70e12, 24 * 10**9),
    "4090": _gpu("RTX 4090 24 GB", 1.008e12, 165e12, 24 * 10**9),
    "3090": _gpu("RTX 3090 24 GB", 936e9, 71e12, 24 * 10**9),
    "t4": _gpu("T4 16 GB", 300e9, 65e12, 16 * 10**9, dtype="fp16"),
}
"""By the names that ``--device`` takes. A T4 has no bfloat16."""


def pass_seconds(
    size: ModelSize, device: Device, length: int, *, tokens: int = 1, precision: Precision = "bf16"
) -> float:
    """Seconds of a pass over ``tokens`` that follow ``length`` cached ones.

    Every layer is taken to read the whole cache, sliding windows included.
    """
    slower = _INT4 if device.is_gpu and precision != "bf16" else 1
    reading = size.bytes_read(tokens, precision) / (device.bandwidth * slower)
    reading += size.kv_bytes_per_token * length / device.kv_bandwidth
    computing = flops(size, tokens, tokens * length) / device.pass_flops
    matrices = max(reading, computing) if device.is_gpu else reading + computing
    return matrices + size.layers * device.layer_seconds


def prefill_flops(size: ModelSize, length: int) -> float:
    """Operations that read a prompt of ``length`` tokens, which bound its prefill.

    Query i sees i keys, length²/2 pairs in all. Logits are computed for the last token only.
    """
    return flops(size, length, length**2 / 2) - 2 * size.head * (length - 1)


def flops(size: ModelSize, tokens: int, pairs: float) -> float:
    """Operations of a pass: two a weight and token; four a layer, query head, pair of query and
    key, and dimension."""
    width = size.heads * size.head_dim
    return 2 * size.active_parameters * tokens + 4 * pairs * size.layers * width


def named_device(name: str) -> Device:
    """A device of the table; raises InvalidParameterError where it is not in it."""
    if name not in DEVICES:
        raise InvalidParameterError(
            f"device={name!r} is unknown; use 'this' to measure this machine, "
            f"{', '.join(map(repr, DEVICES))}, or describe it by bandwidth and tflops"
        )
    return DEVICES[name]


def described_device(bandwidth: float, tflops: float, memory: float | None = None) -> Device:
    """A GPU by the numbers of its data sheet.

    Args:
        bandwidth: of its memory, in GB/s.
        tflops: dense bf16 matrix throughput, in TFLOP/s.
        memory: in GB; None if unknown.

    Raises:
        InvalidParameterError: a number is not positive, or not finite.
    """
    for name, value in (("bandwidth", bandwidth), ("tflops", tflops), ("memory", memory)):
        ok = value is None or (value > 0 and math.isfinite(value))
        require(ok, name, value, "more than 0, and finite")
    size = None if memory is None else round(memory * 1e9)
    name = "a GPU" if memory is None else f"a GPU of {memory:g} GB"
    return _gpu(name, bandwidth * 1e9, tflops * 1e12, size, known_from="the given")
