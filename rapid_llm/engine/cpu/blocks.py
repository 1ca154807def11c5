"""Linear layers with 8-bit or 4-bit weights in blocks, for the compiled kernels.

Groups of 32 weights of a row share a scale. So weights that come from GGUF's Q8_0 or Q4_1 are
recovered as exactly as bfloat16 allows, and layers from Q4_1 can have 4 bits; with one scale per
row the error would be 1 %. Activations are quantized to 16-bit integers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapid_llm.engine.cpu.products import linear
from rapid_llm.engine.quantized import MAX_QUANTIZED_ROWS, QuantizedLinear

GROUP = 32
"""Number of weights of a row that share a scale."""

ROWS = 16
"""Number of outputs (rows of the weight) in a block."""

BLOCK_BYTES = {8: 2 * ROWS + ROWS * GROUP, 4: 4 * ROWS + ROWS * GROUP // 2}
"""Bytes of a block by the number of bits per weight."""

_ON_GRID = 0.1
"""Largest root mean square distance of weights to 16 equidistant values per group, in steps.

Below it weights are taken to have 4 bits. Arbitrary weights have 0.29; 4-bit weights that were
rounded to bfloat16 have 0.02.
"""

_TINY = 2.0**-24  # the smallest float16


class BlockLinear(QuantizedLinear):
    """A linear layer with quantized blocks for few tokens and the original weights for many.

    The compiled kernels multiply with the blocks. :meth:`forward` is the reference: it dequantizes
    the weights, which saves no time.

    Attributes:
        blocks: quantized weights, uint8 ``[out / 16, in / 32, bytes]``, see :func:`eight_bits` and
            :func:`four_bits_if_exact`; padded with rows of zeros to a multiple of 16.
        bits: bits per weight, 8 or 4.
    """

    added = ("blocks",)
    divides = GROUP
    blocks: Tensor
    bits: int

    def _hold(self, blocks: Tensor, bits: int) -> None:
        self.bits = bits
        self.register_buffer("blocks", blocks, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        few = x.numel() // x.shape[-1] <= MAX_QUANTIZED_ROWS
        weight = unpacked(self.blocks, self.bits)[: self.weight.shape[0]] if few else self.weight
        return linear(x, weight.to(x.dtype), self.bias)


class Int8Blocks(BlockLinear):
    """A linear layer with 8-bit weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._hold(eight_bits(linear.weight), 8)


class Int4Blocks(BlockLinear):
    """A linear layer with 4-bit weights if they are exact, else with 8-bit weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        blocks = four_bits_if_exact(linear.weight)
        if blocks is None:
            self._hold(eight_bits(linear.weight), 8)
        else:
            self._hold(blocks, 4)


def eight_bits(weight: Tensor) -> Tensor:
    """Quantize weights ``[out, in]`` to 8 bits in blocks of 16 rows and 32 columns.

    Returns:
        uint8 ``[out / 16, in / 32, 544]``: the step of each row, float16 ``[16]``, and
        ``round(w / step)``, int8 ``[16, 16, 2]``: 16 pairs of columns, 16 rows.
    """
    groups = _groups(weight)
    whole = (groups / (groups.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=_TINY)).round()
    step = _slope(whole, groups)
    pairs = whole.to(torch.int8).unflatten(-1, (-1, 2)).transpose(2, 3)
    return torch.cat([_as_bytes(step), _as_bytes(pairs)], dim=-1)


def four_bits_if_exact(weight: Tensor) -> Tensor | None:
    """Quantize weights ``[out, in]`` to 4 bits in blocks of 16 rows and 32 columns, if exact.

    Returns:
        uint8 ``[out / 16, in / 32, 320]``: the step and the smallest weight of each row, float16
        ``[16]`` each, then ``round((w - smallest) / step)`` in 4 bits, uint16 ``[4, 16, 2]``. The
        first of a pair has columns 0, 2, 4 and 6 of 8, lowest bits first; the second has the
        others. None if the weights are not of 4 bits.
    """
    if weight.shape[0] > ROWS and four_bits_if_exact(weight[:ROWS]) is None:
        return None  # an early exit, as most checkpoints have no 4-bit weights
    groups = _groups(weight)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    exact = (groups - low) / ((high - low) / 15).clamp(min=1e-30)
    whole = exact.round()
    if not (exact - whole).square_().mean().sqrt() < _ON_GRID:  # also true for NaN
        return None
    mean, middle = groups.mean(dim=-1, keepdim=True), whole.mean(dim=-1, keepdim=True)
    step = _slope(whole - middle, groups - mean)
    smallest = (mean - step * middle).half()
    nibbles = whole.to(torch.int32).unflatten(-1, (4, 4, 2)).movedim(2, 3)
    words = sum(nibbles[..., i, :] << 4 * i for i in range(4))
    return torch.cat([_as_bytes(step), _as_bytes(smallest), _as_bytes(words.short())], dim=-1)


def unpacked(blocks: Tensor, bits: int) -> Tensor:
    """Dequantize blocks of :func:`eight_bits` or :func:`four_bits_if_exact`: float32 ``[out, in]``.

    ``out`` includes the rows of padding.
    """
    header = blocks[..., : 2 * ROWS * (8 // bits)].contiguous().view(torch.float16).float()
    step, *smallest = header[..., None].split(ROWS, dim=2)
    rest = blocks[..., 2 * ROWS * (8 // bits) :].contiguous()
    if bits == 8:
        pairs = rest.view(torch.int8).unflatten(-1, (-1, ROWS, 2))
        weights = step * pairs.transpose(2, 3).flatten(3)
    else:
        words = rest.view(torch.int16).to(torch.int32).unflatten(-1, (-1, ROWS, 2))
        nibbles = torch.stack([words >> 4 * i & 15 for i in range(4)], dim=-2)
        weights = smallest[0] + step * nibbles.transpose(2, 3).flatten(3)
    return weights.transpose(1, 2).flatten(2).flatten(0, 1)


def _groups(weight: Tensor) -> Tensor:
    """Weights as float32 ``[out / 16, in / 32, 16, 32]``, padded with rows of zeros."""
    padded = F.pad(weight.detach().float(), (0, 0, 0, -weight.shape[0] % ROWS))
    return padded.unflatten(1, (-1, GROUP)).unflatten(0, (-1, ROWS)).transpose(1, 2)


def _slope(x: Tensor, y: Tensor) -> Tensor:
    """The s that minimises the squares of y - s x along the last dimension, in float16."""
    over = (x * y).sum(dim=-1, keepdim=True)
    return (over / x.square().sum(dim=-1, keepdim=True).clamp(min=1e-30)).half()


def _as_bytes(x: Tensor) -> Tensor:
    """Reinterpret ``[a, b, ...]`` as uint8 ``[a, b, n]``."""
    return x.flatten(2).contiguous().view(torch.uint8)
