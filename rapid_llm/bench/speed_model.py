"""The speed model: what a pass and a round of speculation cost, from sizes alone. No torch here.

A pass is modelled by its roofline (Williams et al., 2009): on a GPU it takes as long as reading
its bytes, doing its arithmetic or launching its kernels, whichever is longest. On a CPU these do
not overlap, and add up (11 tokens take half as long again as 1). A round
drafts γ tokens and verifies γ+1 in one pass; its yield is that of Leviathan et al. (2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rapid_llm.errors import InvalidParameterError

Precision = Literal["bf16", "int8", "int4"]

ACCEPTANCE = 0.8
"""The acceptance rate a, where none is given. Self-speculation of a small model on a text of 7.6K
tokens at γ = 10 yielded 4 tokens a round at temperature 1 and 5 to 6 greedily, which are a = 0.76
and 0.83 to 0.87."""

BANDWIDTH_FRACTION = 0.8
"""Of a data sheet's memory bandwidth, what a decoding step reaches (assumed)."""

COMPUTE_FRACTION = 0.6
"""Of a data sheet's matrix throughput, what a prefill reaches (assumed)."""

LAYER_LAUNCH = 100e-6
"""Seconds to launch one layer's kernels from Python: about 20 of 5 µs (assumed)."""

MEMORY_FRACTION = 0.9
"""Of a device's memory, what weights and KV may fill; the rest is for activations (assumed)."""

_ITEMSIZE = 2  # bytes of a 16-bit number: KV, scales, and whatever is not quantized
_BLOCK = 32  # weights that share a scale, in GGUF files as in our own drafter


@dataclass(frozen=True)
class ModelSize:
    """What the speed model needs to know of a model; all counts are of parameters.

    Attributes:
        lookup: the input embedding, of which a pass reads some rows only; 0 if it is tied.
        head: the output layer, tied or not; part of ``matrices``.
        matrices: what every pass reads in full and quantization shrinks, experts apart.
        experts: all routed experts of all layers.
        expert_share: experts a token is routed to ÷ experts of a layer.
        vectors: norms and biases, never quantized.
        context_window: positions that the model was made for.
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
        """What an int8 or int4 copy of the matrices takes beside the model's own weights."""
        return round(self._matrix_bytes(self.experts, precision))

    def bytes_read(self, tokens: int, precision: Precision) -> float:
        """Weight bytes that a pass over ``tokens`` reads: W, for one token.

        Tokens are taken to choose their experts independently and evenly, so n of them need the
        share 1 − (1 − share)ⁿ of the experts.
        """
        experts = self.experts * (1 - (1 - self.expert_share) ** tokens)
        return self._matrix_bytes(experts, precision) + self.vectors * _ITEMSIZE

    def _matrix_bytes(self, experts: float, precision: Precision) -> float:
        """Bytes of the matrices and so many of the experts' weights.

        A block has a scale in int8, and its smallest weight too in int4, where the head stays int8.
        """
        if precision == "bf16":
            return (self.matrices + experts) * _ITEMSIZE
        int8 = 1 + _ITEMSIZE / _BLOCK
        layers = int8 if precision == "int8" else 0.5 + 2 * _ITEMSIZE / _BLOCK
        return self.head * int8 + (self.matrices - self.head + experts) * layers


@dataclass(frozen=True)
class Device:
    """What a device achieves, in bytes, seconds and floating-point operations.

    Attributes:
        bandwidth: bytes/s of weights read by a matrix-vector product.
        kv_bandwidth: bytes/s of keys and values read by attention.
        flops: a second, in bf16 matrix products of a prefill.
        pass_flops: a second, in passes of few tokens.
        memory: bytes; None where it cannot be told.
        layer_overhead: seconds a layer takes when there is next to nothing to compute.
        overlaps: whether reading, computing and overhead go on at the same time, as on a GPU.
        source: where the numbers come from.
    """

    name: str
    bandwidth: float
    kv_bandwidth: float
    flops: float
    pass_flops: float
    memory: int | None
    layer_overhead: float
    overlaps: bool
    source: str


def _gpu(name: str, bandwidth: float, flops: float, memory: int) -> Device:
    achieved = bandwidth * BANDWIDTH_FRACTION
    return Device(
        name=name,
        bandwidth=achieved,
        kv_bandwidth=achieved,
        flops=flops * COMPUTE_FRACTION,
        pass_flops=flops * COMPUTE_FRACTION,
        memory=memory,
        layer_overhead=LAYER_LAUNCH,
        overlaps=True,
        source=f"data sheet: {bandwidth / 1e9:,.0f} GB/s and {flops / 1e12:,.0f} TFLOP/s (dense "
        f"bf16); {BANDWIDTH_FRACTION:.0%} and {COMPUTE_FRACTION:.0%} of these are assumed to be "
        f"reached, and {LAYER_LAUNCH * 1e6:.0f} µs needed to launch a layer's kernels",
    )


DEVICES = {
    "h100": _gpu("H100 SXM 80 GB", 3.35e12, 989e12, 80 * 10**9),
    "a100": _gpu("A100 SXM 80 GB", 2.039e12, 312e12, 80 * 10**9),
    "l40s": _gpu("L40S 48 GB", 864e9, 362e12, 48 * 10**9),
    "4090": _gpu("RTX 4090 24 GB", 1.008e12, 165e12, 24 * 10**9),
}
"""By the names that ``--device`` takes; NVIDIA's data sheets, without sparsity, and for the
RTX 4090 the Ada white paper's rate with float32 accumulation."""


def step_seconds(
    size: ModelSize,
    device: Device,
    length: int,
    *,
    tokens: int = 1,
    precision: Precision = "bf16",
) -> float:
    """Seconds of a pass over ``tokens`` that follow ``length`` cached ones.

    Every layer is taken to read the whole cache, sliding windows included.
    """
    reading = size.bytes_read(tokens, precision) / device.bandwidth
    reading += size.kv_bytes_per_token * length / device.kv_bandwidth
    computing = flops(size, tokens, tokens * length) / device.pass_flops
    overhead = size.layers * device.layer_overhead
    parts = reading, computing, overhead
    return max(parts) if device.overlaps else sum(parts)


def prefill_seconds(size: ModelSize, device: Device, length: int) -> float:
    """Seconds to read a prompt of ``length`` tokens; arithmetic bounds it.

    Query i sees i keys, length²/2 pairs in all. Logits are computed for the last token only.
    """
    operations = flops(size, length, length**2 / 2) - 2 * size.head * (length - 1)
    return operations / device.flops


def flops(size: ModelSize, tokens: int, pairs: float) -> float:
    """Operations of a pass: two a weight and token; four a layer, query head, pair of query and
    key, and dimension."""
    return 2 * size.active_parameters * tokens + 4 * pairs * size.layers * (
        size.heads * size.head_dim
    )


def named_device(name: str) -> Device:
    """A device of the table.

    Raises:
        InvalidParameterError: it is not in the table.
    """
    if name not in DEVICES:
        raise InvalidParameterError(
            f"device={name!r} is unknown; use 'this' to measure this machine, or "
            f"{', '.join(map(repr, DEVICES))}"
        )
    return DEVICES[name]
