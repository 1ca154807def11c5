"""Predict the time of a pass and of a round of speculation from sizes alone, without torch.

A pass is modelled by its roofline (Williams et al., 2009). On a GPU its matrix products take as
long as reading their bytes or doing their arithmetic, whichever is longer; on a CPU both times add
up (11 tokens take half as long again as 1). Each layer adds a constant. A round drafts γ tokens,
verifies γ+1 in one pass, and waits for the host once; its expected number of tokens is that of
Leviathan et al. (2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rapid_llm.errors import InvalidParameterError

Precision = Literal["bf16", "int8", "int4", "int4g64"]
"""Formats of weights: ``int4`` of GGUF files and of our drafter on a CPU, ``int4g64`` on CUDA."""

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

_ITEMSIZE = 2  # bytes of a 16-bit number: KV, scales, and weights that are not quantized
# Bytes of a weight of the layers, and of the output layer. 32 weights share a 16-bit scale, and in
# int4 a 16-bit minimum too, with an output layer in int8; on CUDA 64 weights share both.
_BYTES: dict[Precision, tuple[float, float]] = {
    "bf16": (2, 2),
    "int8": (1 + 2 / 32, 1 + 2 / 32),
    "int4": (0.5 + 4 / 32, 1 + 2 / 32),
    "int4g64": (0.5 + 4 / 64, 0.5 + 4 / 64),
}


def require(ok: bool, name: str, value: object, limit: str) -> None:
    """Raise InvalidParameterError, which names a value and its limit, unless ``ok``."""
    if not ok:
        raise InvalidParameterError(f"{name}={value} is not allowed: it must be {limit}")


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model, in parameters where no other unit is given.

    Attributes:
        name: name of the model.
        lookup: input embedding, of which a pass reads only some rows; 0 if it is tied.
        head: output layer, tied or not; part of ``matrices``.
        matrices: weights that every pass reads in full and that can be quantized, without experts.
        experts: all routed experts of all layers.
        expert_share: experts that a token is routed to ÷ experts of a layer.
        vectors: norms and biases, never quantized.
        layers, heads, kv_heads, head_dim, hidden_size: as in the model's config.
        context_window: context window in tokens.
        shared_by: number that the number of tensor-parallel ranks must divide; 0 if each rank has
            all KV.
    """

    name: str
    lookup: int
    head: int
    matrices: int
    experts: int
    expert_share: float
    vectors: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    context_window: int
    shared_by: int

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return self.lookup + self.matrices + self.experts + self.vectors

    @property
    def active_parameters(self) -> float:
        """Number of parameters that one token is multiplied with."""
        return self.matrices + self.experts * self.expert_share

    @property
    def kv_bytes_per_token(self) -> int:
        """k = layers · 2 · kv_heads · head_dim · itemsize, in bf16."""
        return self.layers * 2 * self.kv_heads * self.head_dim * _ITEMSIZE

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in bf16."""
        return self.parameters * _ITEMSIZE

    def mapped_bytes(self, devices: int, tokens: int) -> int:
        """Bytes on the fullest device under a device map, which spreads whole layers with their KV.

        Args:
            devices: number of devices.
            tokens: tokens in the cache.
        """
        layers = -(-self.layers // devices)
        in_layers = self.matrices + self.experts + self.vectors - self.head
        ends = self.lookup + self.head if devices == 1 else max(self.lookup, self.head)
        weights = in_layers / self.layers * layers + ends
        return round(weights * _ITEMSIZE + self.kv_bytes_per_token * tokens / self.layers * layers)

    def sharded_bytes(self, devices: int, tokens: int) -> int | None:
        """Bytes on each device in tensor parallel; None where heads do not divide.

        Args:
            devices: number of devices.
            tokens: tokens in the cache.
        """
        if self.shared_by and self.shared_by % devices:
            return None
        weights = (self.lookup + self.matrices + self.experts) / devices + self.vectors
        kv = self.kv_bytes_per_token * tokens / (devices if self.shared_by else 1)
        return round(weights * _ITEMSIZE + kv)

    def quantized_bytes(self, precision: Precision) -> int:
        """Bytes of a quantized copy, which shares all other weights with the model."""
        return round(self._matrix_bytes(self.experts, precision))

    def bytes_read(self, tokens: int, precision: Precision) -> float:
        """Bytes of weights that a pass over ``tokens`` tokens reads (W for one token).

        Tokens are assumed to choose experts independently and evenly, so that n tokens read the
        share 1 − (1 − share)ⁿ of the experts.
        """
        experts = self.experts * (1 - (1 - self.expert_share) ** tokens)
        return self._matrix_bytes(experts, precision) + self.vectors * _ITEMSIZE

    def _matrix_bytes(self, experts: float, precision: Precision) -> float:
        """Bytes of the matrices and of ``experts`` weights of experts."""
        layers, head = _BYTES[precision]
        return self.head * head + (self.matrices - self.head + experts) * layers


@dataclass(frozen=True)
class Device:
    """Rates that a device achieves.

    Attributes:
        name: name of the device.
        bandwidth: bytes/s of weights read by matrix-vector products.
        kv_bandwidth: bytes/s of keys and values read by attention.
        flops: operations/s of bf16 matrix products in a prefill.
        pass_flops: operations/s in passes of few tokens.
        memory: bytes of memory; None if unknown.
        layer_seconds: constant time of a layer in a pass.
        round_seconds: time of a round or plain step in addition to its passes.
        is_gpu: whether it is a GPU.
        source: source of the numbers.
        dtype: dtype of KV and of weights that are not quantized.
    """

    name: str
    bandwidth: float
    kv_bandwidth: float
    flops: float
    pass_flops: float
    memory: int | None
    layer_seconds: float
    round_seconds: float
    is_gpu: bool
    source: str
    dtype: Literal["bf16", "fp16"] = "bf16"

    @property
    def quantizations(self) -> tuple[Precision, ...]:
        """Formats of a drafter's quantized weights; int4 on a GPU needs bfloat16."""
        if not self.is_gpu:
            return "int8", "int4"
        return ("int4g64",) if self.dtype == "bf16" else ()

    @property
    def rates(self) -> str:
        """The rates in a sentence."""
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
"""GPUs by the names that ``--device`` takes. A T4 has no bfloat16."""


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


def described_device(bandwidth: float, tflops: float, memory: float | None = None) -> Device:
    """A GPU described by its data sheet.

    Args:
        bandwidth: memory bandwidth in GB/s.
        tflops: dense bf16 matrix throughput in TFLOP/s.
        memory: memory in GB; None if unknown.

    Raises:
        InvalidParameterError: a number is not positive, or not finite.
    """
    for name, value in (("bandwidth", bandwidth), ("tflops", tflops), ("memory", memory)):
        ok = value is None or (value > 0 and math.isfinite(value))
        require(ok, name, value, "more than 0, and finite")
    size = None if memory is None else round(memory * 1e9)
    name = "a GPU" if memory is None else f"a GPU of {memory:g} GB"
    return _gpu(name, bandwidth * 1e9, tflops * 1e12, size, known_from="the given")
