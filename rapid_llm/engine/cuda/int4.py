"""Weights of 4 bits for a drafter on CUDA, multiplied by torch's own operators (tinygemm).

A group of weights of a row shares a step and a middle: ``w ≈ (n - 8) * step + middle``, n in 0..15.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rapid_llm.engine.device import Pass
from rapid_llm.engine.identity import ModelState
from rapid_llm.engine.lean import LeanPass
from rapid_llm.engine.quantized import (
    MAX_QUANTIZED_ROWS,
    QuantizedLinear,
    QuantizedWeights,
    copy_of,
)
from rapid_llm.errors import InvalidParameterError
from rapid_llm.models import sharing_copy

GROUP = 64
"""Weights that share a step: of 4.5 bits a weight half a bit."""

_ROWS = 4096  # quantized at a time: a vocabulary's in float32 would take gigabytes
_LARGE = 10**9  # bytes: read in a third of a millisecond, in which some 100 kernels run
_INNER_TILES = 8  # of the operators' layout: 128 columns


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of 16 equidistant values, from the least to the greatest of a group.

    Args:
        weight: ``[out, in]``; ``in`` is a multiple of :data:`GROUP`.

    Returns:
        The numbers n, uint8 ``[out, in]``; steps and middles, bfloat16 ``[in / group, out, 2]``.
    """
    parts = [_quantize(rows) for rows in weight.detach().split(_ROWS)]
    return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts], dim=1)


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    # Rounded first, so that n is the nearest to the weight with the step that is kept.
    step = ((high - low) / 15).clamp(min=1e-6).bfloat16().float()
    middle = (low + 8 * step).bfloat16().float()
    numbers = (groups - middle).div_(step).add_(8).round_().clamp_(0, 15)
    scales = torch.cat([step, middle], dim=-1).transpose(0, 1)
    return numbers.flatten(1).to(torch.uint8), scales.contiguous().bfloat16()


def dequantize(numbers: Tensor, scales: Tensor) -> Tensor:
    """The weights that :func:`quantize` kept, float32 ``[out, in]``."""
    step, middle = scales.float().transpose(0, 1)[..., None].unbind(dim=2)
    groups = numbers.float().unflatten(1, (scales.shape[0], -1))
    return ((groups - 8) * step + middle).flatten(1)


class _Packed(nn.Module):
    """Rows of 4-bit weights.

    Attributes:
        packed: int32, as the operators want the numbers.
        scales: see :func:`quantize`.
    """

    stands_for = None
    packed: Tensor
    scales: Tensor

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        parts = [quantize(weight) for weight in weights]
        numbers = torch.cat([part for part, _ in parts])
        self.register_buffer("packed", _pack(numbers), persistent=False)
        scales = torch.cat([part for _, part in parts], dim=1)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return _multiply(x, self.packed, self.scales)


class Int4Linear(QuantizedLinear):
    """A linear layer that multiplies few tokens with 4-bit weights, many with its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.few = _Packed([linear.weight])

    def product(self, x: Tensor) -> Tensor:
        """``[n, in]`` to ``[n, out]``."""
        if x.shape[0] > MAX_QUANTIZED_ROWS:
            return F.linear(x, self.weight, self.bias)
        out: Tensor = self.few(x)
        return out if self.bias is None else out + self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class Int4Together(QuantizedWeights):
    """Linear layers of one input as one product with 4-bit weights, where tokens are few.

    The layers themselves stay what they were, for many tokens.
    """

    stands_for = None

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        self._linears = linears  # a tuple: these modules already have a parent
        self._sizes = [linear.weight.shape[0] for linear in linears]
        self.few = _Packed([linear.weight for linear in linears])

    def product(self, x: Tensor) -> Tensor:
        """``[n, in]`` to the layers' outputs side by side."""
        if x.shape[0] > MAX_QUANTIZED_ROWS:
            return torch.cat(self._many(x), dim=1)
        out: Tensor = self.few(x)
        biases: list[Tensor] = [each.bias for each in self._linears if each.bias is not None]
        return out + torch.cat(biases) if biases else out

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[n, in]`` in, one ``[n, out]`` a layer."""
        if x.shape[0] > MAX_QUANTIZED_ROWS:
            return self._many(x)
        return self.product(x).split(self._sizes, dim=-1)

    def _many(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, each.weight, each.bias) for each in self._linears)


_TOGETHER = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Layers of one input, and where the lean pass looks for their common product."""


def int4_copy(model: PreTrainedModel, *, lean: bool) -> PreTrainedModel:
    """The same model with 4-bit linear layers; every weight of its own is shared, not copied.

    Args:
        model: bfloat16, on a device of which :func:`runs_on` is true.
        lean: it is read by the lean pass: layers of one input become one product.
    """
    copy = sharing_copy(model)
    with torch.inference_mode(False):  # or the quantized weights would be of use there only
        for parent in list(copy.modules()):
            left = {name for name, child in parent.named_children() if _fits(child)}
            for together, names in _TOGETHER.items() if lean else ():
                if left.issuperset(names):
                    left.difference_update(names)
                    setattr(parent, together, Int4Together(*(getattr(parent, n) for n in names)))
            for name in left:
                setattr(parent, name, Int4Linear(getattr(parent, name)))
    return copy


def copy(model: PreTrainedModel, state: ModelState, passes: Sequence[Pass]) -> PreTrainedModel:
    """As :meth:`rapid_llm.engine.device.Quantizer.copy`."""
    lean = any(isinstance(each, LeanPass) for each in passes)
    return copy_of(model, state, ("int4", lean), lambda model: int4_copy(model, lean=lean))


def require(model: PreTrainedModel, name: str, passes: Sequence[Pass]) -> None:
    """Raises InvalidParameterError where :func:`runs_on` is false."""
    if not runs_on(model):
        raise InvalidParameterError(
            f"drafter_quantization='int4' needs a drafter in bfloat16 on an Ampere GPU or a newer "
            f"one, with layers of multiples of 128 inputs, but {name} is in {model.dtype} on "
            f"{model.device}; load it so (dtype='bfloat16'), or leave drafter_quantization out"
        )


def runs_on(model: PreTrainedModel) -> bool:
    """Whether a model has layers for the operators, in bfloat16 on Ampere or a newer GPU."""
    return any(map(_fits, model.modules())) and all(
        tensor.dtype == torch.bfloat16
        and tensor.device.type == "cuda"
        and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
        for tensor in model.parameters()
    )


def pays(model: PreTrainedModel, passes: Sequence[Pass]) -> bool:
    """Whether reading weights is what a step of this model takes: the launches of a small one, and
    what 16 values a group lose of it, cost more than is saved."""
    return runs_on(model) and sum(tensor.nbytes for tensor in model.parameters()) >= _LARGE


def _fits(module: nn.Module) -> bool:
    """Whether the operators take a layer of this shape."""
    if type(module) is not nn.Linear:
        return False
    out, columns = module.weight.shape
    return out % 8 == 0 and columns % (16 * _INNER_TILES) == 0 and columns % GROUP == 0


def _pack(numbers: Tensor) -> Tensor:
    if numbers.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int(), _INNER_TILES)
    pairs = numbers[:, ::2] << 4 | numbers[:, 1::2]
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _INNER_TILES)


def _multiply(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales.to(x.dtype))
    return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)
