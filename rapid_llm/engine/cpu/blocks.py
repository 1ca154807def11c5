"""Linear layers in blocks of 8 or 4 bits a weight, for the compiled kernels.

32 weights of a row share a scale. What a checkpoint was quantized to is then found again in its
weights: GGUF's Q8_0, and Q4_1, whose layers can be 4 bits in the drafter too. They are as near to
the file as bfloat16 is; one scale a row would be 1 % off. Activations become 16-bit whole numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapid_llm.engine.cpu.products import linear
from rapid_llm.engine.quantized import MAX_QUANTIZED_ROWS, QuantizedLinear

GROUP = 32
"""Weights of a row that share a scale in a block."""

ROWS = 16
"""Outputs of a block."""

BLOCK_BYTES = {8: 2 * ROWS + ROWS * GROUP, 4: 4 * ROWS + ROWS * GROUP // 2}
"""Of a block of so many bits a weight."""

_ON_GRID = 0.1
"""Weights hold no more than 4 bits if they are nearer than this, in the root mean square, to 16
equidistant values a group, whose distance is 1: any weights have 0.29, and those that had 4 bits
before they were rounded to bfloat16 have 0.02."""

_TINY = 2.0**-24  # the smallest float16


class BlockLinear(QuantizedLinear):
    """A linear layer that multiplies few tokens with blocks of few bits, many with its own weights.

    The compiled kernels do so; here the weights are made whole again, which saves nothing.

    Attributes:
        blocks: uint8 ``[out / 16, in / 32, bytes]``, see :func:`eight_bits` and
            :func:`four_bits_if_exact`; the last rows are zeros where 16 do not divide ``out``.
        bits: of a weight.
    """

    made_anew = ("blocks",)
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
    """Of 8 bits a weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._hold(eight_bits(linear.weight), 8)


class Int4Blocks(BlockLinear):
    """Of 4 bits a weight where the weights hold no more, of 8 elsewhere."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        blocks = four_bits_if_exact(linear.weight)
        if blocks is None:
            self._hold(eight_bits(linear.weight), 8)
        else:
            self._hold(blocks, 4)


def eight_bits(weight: Tensor) -> Tensor:
    """The weights ``[out, in]`` in blocks of 16 rows and 32 columns.

    Returns:
        uint8 ``[out / 16, in / 32, 544]``: a step of each row, ``[16]`` (float16), and
        ``round(w / step)``, ``[16, 16, 2]`` (int8) of 16 pairs of columns in 16 rows.
    """
    groups = _groups(weight)
    whole = (groups / (groups.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=_TINY)).round()
    step = _slope(whole, groups)
    pairs = whole.to(torch.int8).unflatten(-1, (-1, 2)).transpose(2, 3)
    return torch.cat([_as_bytes(step), _as_bytes(pairs)], dim=-1)


def four_bits_if_exact(weight: Tensor) -> Tensor | None:
    """The weights ``[out, in]`` in blocks of 16 rows and 32 columns, if they hold no more.

    Returns:
        uint8 ``[out / 16, in / 32, 320]``: a step of each row, ``[16]``, and its smallest weight,
        ``[16]`` (float16), then ``round((w - smallest) / step)``, 4 bits each: ``[4, 16, 2]``
        (uint16), where the first of a pair has columns 0, 2, 4 and 6 of 8, lowest bits first, and
        the second the others.
    """
    if weight.shape[0] > ROWS and four_bits_if_exact(weight[:ROWS]) is None:
        return None  # most checkpoints have no 4-bit weights: this tells sooner
    groups = _groups(weight)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    exact = (groups - low) / ((high - low) / 15).clamp(min=1e-30)
    whole = exact.round()
    if not (exact - whole).square_().mean().sqrt() < _ON_GRID:  # NaN neither
        return None
    mean, middle = groups.mean(dim=-1, keepdim=True), whole.mean(dim=-1, keepdim=True)
    step = _slope(whole - middle, groups - mean)
    smallest = (mean - step * middle).half()
    nibbles = whole.to(torch.int32).unflatten(-1, (4, 4, 2)).movedim(2, 3)
    words = sum(nibbles[..., i, :] << 4 * i for i in range(4))
    return torch.cat([_as_bytes(step), _as_bytes(smallest), _as_bytes(words.short())], dim=-1)


def unpacked(blocks: Tensor, bits: int) -> Tensor:
    """Float32 ``[out, in]`` of :func:`eight_bits` or :func:`four_bits_if_exact`."""
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
    """Float32 ``[out / 16, in / 32, 16, 32]``, with rows of zeros at the end."""
    padded = F.pad(weight.detach().float(), (0, 0, 0, -weight.shape[0] % ROWS))
    return padded.unflatten(1, (-1, GROUP)).unflatten(0, (-1, ROWS)).transpose(1, 2)


def _slope(x: Tensor, y: Tensor) -> Tensor:
    """Float16 s of the least squares of y - s x, along the last dimension."""
    over = (x * y).sum(dim=-1, keepdim=True)
    return (over / x.square().sum(dim=-1, keepdim=True).clamp(min=1e-30)).half()


def _as_bytes(x: Tensor) -> Tensor:
    """``[a, b, ...]`` as uint8 ``[a, b, n]``."""
    return x.flatten(2).contiguous().view(torch.uint8)
