"""Linear layers with 4-bit weights for drafting on CUDA, with PyTorch's operators (tinygemm).

A group of weights of a row shares a step and a middle: ``w ≈ (n - 8) * step + middle``, n in 0..15.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rapid_llm.engine.device import Pass
from rapid_llm.engine.lean_pass import LeanPass
from rapid_llm.engine.model_state import ModelState
from rapid_llm.engine.quantized import (
    MAX_QUANTIZED_ROWS,
    QuantizedLinear,
    QuantizedWeights,
    copy_of,
)
from rapid_llm.errors import InvalidParameterError
from rapid_llm.shared_weights import sharing_copy

GROUP = 64
"""Number of weights of a row that share a step; steps and middles take half a bit per weight."""

_ROWS = 4096  # rows quantized at a time, as a whole vocabulary in float32 would take gigabytes
_LARGE = 10**9  # bytes that take 0.3 ms to read, about the time of 100 small kernels
_INNER_TILES = 8  # inner tiles of the operators' layout: 128 columns


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize weights to 16 equidistant values between the minimum and maximum of each group.

    Args:
        weight: weights ``[out, in]``; ``in`` is a multiple of :data:`GROUP`.

    Returns:
        Numbers n, uint8 ``[out, in]``; steps and middles, bfloat16 ``[in / group, out, 2]``.
    """
    parts = [_quantize(rows) for rows in weight.detach().split(_ROWS)]
    return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts], dim=1)


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    # Round the step first, so that n is the best for the step that is stored.
    step = ((high - low) / 15).clamp(min=1e-6).bfloat16().float()
    middle = (low + 8 * step).bfloat16().float()
    numbers = (groups - middle).div_(step).add_(8).round_().clamp_(0, 15)
    scales = torch.cat([step, middle], dim=-1).transpose(0, 1)
    return numbers.flatten(1).to(torch.uint8), scales.contiguous().bfloat16()


def dequantize(numbers: Tensor, scales: Tensor) -> Tensor:
    """Weights from the results of :func:`quantize`, float32 ``[out, in]``."""
    step, middle = scales.float().transpose(0, 1)[..., None].unbind(dim=2)
    groups = numbers.float().unflatten(1, (scales.shape[0], -1))
    return ((groups - 8) * step + middle).flatten(1)


class _Packed(nn.Module):
    """4-bit weights of one or several layers in one product.

    Attributes:
        packed: numbers in the operators' layout, int32.
        scales: steps and middles, see :func:`quantize`.
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
    """A linear layer with 4-bit weights for few tokens and the original ones for many."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.few = _Packed([linear.weight])

    def product(self, x: Tensor) -> Tensor:
        """Output of the layer: ``[n, in]`` to ``[n, out]``."""
        if x.shape[0] > MAX_QUANTIZED_ROWS:
            return F.linear(x, self.weight, self.bias)
        out: Tensor = self.few(x)
        return out if self.bias is None else out + self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class Int4Together(QuantizedWeights):
    """Linear layers of the same input as one product with 4-bit weights, for few tokens.

    For many tokens the original layers are used.

    Args:
        linears: original layers, in order.
    """

    stands_for = None

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        self._linears = linears  # a tuple, so that they are not registered: they have a parent
        self._sizes = [linear.weight.shape[0] for linear in linears]
        self.few = _Packed([linear.weight for linear in linears])

    def product(self, x: Tensor) -> Tensor:
        """Concatenated outputs of the layers for inputs ``[n, in]``."""
        if x.shape[0] > MAX_QUANTIZED_ROWS:
            return torch.cat(self._many(x), dim=1)
        out: Tensor = self.few(x)
        biases: list[Tensor] = [each.bias for each in self._linears if each.bias is not None]
        return out + torch.cat(biases) if biases else out

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the layers, ``[n, out]`` each, for inputs ``[n, in]``."""
        if x.shape[0] > MAX_QUANTIZED_ROWS:
            return self._many(x)
        return self.product(x).split(self._sizes, dim=-1)

    def _many(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, each.weight, each.bias) for each in self._linears)


_TOGETHER = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Layers of the same input, by the attribute under which the lean pass finds their product."""


def int4_copy(model: PreTrainedModel, *, lean: bool) -> PreTrainedModel:
    """A copy of a model with 4-bit linear layers, which shares the original weights.

    Args:
        model: model for which :func:`runs_on` is true.
        lean: whether the copy runs lean passes, so that layers of the same input become one
            product.
    """
    copy = sharing_copy(model)
    with torch.inference_mode(False):  # inference tensors could not be used outside that mode
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
    """See :meth:`rapid_llm.engine.device.Quantizer.copy`."""
    lean = any(isinstance(each, LeanPass) for each in passes)
    return copy_of(model, state, ("int4", lean), lambda model: int4_copy(model, lean=lean))


def require(model: PreTrainedModel, name: str, passes: Sequence[Pass]) -> None:
    """See :meth:`rapid_llm.engine.device.Quantizer.require`.

    Raises:
        InvalidParameterError: :func:`runs_on` is false for the model.
    """
    if not runs_on(model):
        raise InvalidParameterError(
            f"drafter_quantization='int4' needs a drafter in bfloat16 on an Ampere GPU or a newer "
            f"one, with layers of multiples of 128 inputs, but {name} is in {model.dtype} on "
            f"{model.device}; load it so (dtype='bfloat16'), or leave drafter_quantization out"
        )


def runs_on(model: PreTrainedModel) -> bool:
    """Whether a model has suitable layers, in bfloat16 on Ampere or a newer GPU."""
    return any(map(_fits, model.modules())) and all(
        tensor.dtype == torch.bfloat16
        and tensor.device.type == "cuda"
        and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
        for tensor in model.parameters()
    )


def pays(model: PreTrainedModel, passes: Sequence[Pass]) -> bool:
    """Whether 4-bit weights make a draft step faster, as for large models.

    A step of a small model is limited by launches, and 4 bits lower its acceptance.
    """
    return runs_on(model) and sum(tensor.nbytes for tensor in model.parameters()) >= _LARGE


def _fits(module: nn.Module) -> bool:
    """Whether the operators support a linear layer of this shape."""
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
