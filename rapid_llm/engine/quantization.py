"""Int8 weights for a drafter: half the bytes that a draft step reads.

Weight-only and symmetric, one scale an output row: ``w ≈ scale * round(w / scale)`` with
``scale = max|w| / 127``. Activations stay in the model's dtype. The products are torch's own.

A checkpoint that was quantized to 4 bits (GGUF's Q4_1) has no more in its weights. Such layers can
be 4 bits in the drafter too, as they were: nothing is lost, and less is read.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rapid_llm.engine.products import linear
from rapid_llm.errors import InvalidParameterError
from rapid_llm.models import sharing_copy

FEW_ROWS = 8
"""Up to so many tokens PyTorch's int8 product reads less than it computes more; the compiled
kernels' does so for all that they take."""


class FewBitLinear(nn.Module):
    """A linear layer that multiplies few tokens with weights of few bits, many with its own.

    Attributes:
        weight, bias: the layer's it was made from, shared; a prefill is faster with these.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias


class Int8Linear(FewBitLinear):
    """A linear layer that multiplies few tokens with int8 weights, many with its own.

    Attributes:
        int8: int8 ``[out, in]``.
        scale: ``[out]`` in the weight's dtype.
    """

    int8: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        full = linear.weight.detach().float()
        scale = full.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        rounded = (full / scale[:, None]).round_().clamp_(-127, 127)
        self.register_buffer("int8", rounded.to(torch.int8), persistent=False)
        self.register_buffer("scale", scale.to(linear.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] > FEW_ROWS:
            return linear(x, self.weight, self.bias)
        out = torch.ops.aten._weight_int8pack_mm(rows, self.int8, self.scale)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], -1)


GROUP = 32
"""Weights of a row that share the two numbers of a 4-bit layer."""

ROWS = 16
"""Outputs whose weights lie together in one."""

_ON_GRID = 0.1
"""Weights hold no more than 4 bits if they are nearer than this, in the root mean square, to 16
equidistant values a group, whose distance is 1: any weights have 0.29, and those that had 4 bits
before they were rounded to bfloat16 have 0.02."""


class Int4Linear(FewBitLinear):
    """A linear layer that multiplies few tokens with 4-bit weights, many with its own.

    The compiled kernels do so; here the weights are made whole again, which saves nothing.

    Attributes:
        packed: uint8 ``[out / 16, in / 32, 320]``. Of 32 weights in each of 16 rows it has the
            smallest, ``[16]``, and the step, ``[16]`` (bfloat16), then
            ``round((w - smallest) / step)``, 4 bits each: ``[8, 16, 2]`` of the first 16 weights in
            pairs, in the low bits, and of the others in the high ones.
    """

    packed: Tensor

    def __init__(self, linear: nn.Linear, packed: Tensor) -> None:
        super().__init__(linear)
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        few = x.numel() // x.shape[-1] <= FEW_ROWS
        weight = unpacked(self.packed).to(x.dtype) if few else self.weight
        return linear(x, weight, self.bias)


def packed_if_exact(weight: Tensor) -> Tensor | None:
    """The weights ``[out, in]`` in 4 bits (see :class:`Int4Linear`), if they hold no more."""
    if weight.shape[0] % ROWS or weight.shape[1] % GROUP:
        return None
    if weight.shape[0] > ROWS and packed_if_exact(weight[:ROWS]) is None:
        return None  # most checkpoints have no 4-bit weights: this tells sooner
    # [out / 16, in / 32, 16, 32]
    groups = weight.detach().float().unflatten(1, (-1, GROUP)).unflatten(0, (-1, ROWS))
    groups = groups.transpose(1, 2)
    low, high = groups.aminmax(dim=-1)
    smallest = low.bfloat16()
    step = ((high - smallest.float()) / 15).clamp(min=1e-30).bfloat16()
    exact = (groups - smallest.float()[..., None]) / step.float()[..., None]
    whole = exact.round().clamp_(0, 15)
    if (exact - whole).square_().mean().sqrt() > _ON_GRID:
        return None
    first, second = whole.to(torch.uint8).split(GROUP // 2, dim=-1)
    pairs = (first | second << 4).unflatten(-1, (-1, 2)).transpose(2, 3)
    header = torch.cat([smallest, step], dim=-1).view(torch.uint8)
    return torch.cat([header, pairs.flatten(2)], dim=-1)


def unpacked(packed: Tensor) -> Tensor:
    """Float32 ``[out, in]`` of :func:`packed_if_exact`."""
    header = packed[..., : 4 * ROWS].contiguous().view(torch.bfloat16).float()
    smallest, step = header[..., None].split(ROWS, dim=2)
    two = packed[..., 4 * ROWS :].unflatten(-1, (-1, ROWS, 2)).transpose(2, 3).flatten(3)
    whole = torch.cat([two & 15, two >> 4], dim=-1)
    return (smallest + step * whole).transpose(1, 2).flatten(2).flatten(0, 1)


class Int8Projections(nn.Module):
    """Query, key and value of one attention layer as one product, where tokens are few.

    The layers' int8 weights become views of one tensor, so that nothing is stored twice.
    """

    def __init__(self, *layers: Int8Linear) -> None:
        super().__init__()
        self._layers = layers  # a tuple: these modules already have a parent
        self._sizes = [layer.int8.shape[0] for layer in layers]
        for name in ("int8", "scale"):
            together = torch.cat([getattr(layer, name) for layer in layers])
            self.register_buffer(f"_{name}", together, persistent=False)
            for layer, part in zip(layers, together.split(self._sizes), strict=True):
                setattr(layer, name, part)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[n, hidden]`` in, one ``[n, out]`` a layer."""
        if x.shape[0] > FEW_ROWS:
            return tuple(layer(x) for layer in self._layers)
        product = torch.ops.aten._weight_int8pack_mm(x, self._int8, self._scale)
        parts = product.split(self._sizes, dim=-1)
        return tuple(
            part if layer.bias is None else part + layer.bias
            for part, layer in zip(parts, self._layers, strict=True)
        )


_twins: WeakKeyDictionary[PreTrainedModel, dict[bool, PreTrainedModel]] = WeakKeyDictionary()
_making = threading.Lock()


def int8_twin(model: PreTrainedModel, four_bits: bool = False) -> PreTrainedModel:
    """The same model with int8 linear layers; every weight of its own is shared, not copied.

    Made once for a model and a choice of ``four_bits``, freed with the model.

    Args:
        model: to be quantized.
        four_bits: make it 4 bits in layers whose weights hold no more: for the compiled kernels.
    """
    with _making:
        twins = _twins.setdefault(model, {})
        if four_bits not in twins:
            twins[four_bits] = _quantized_copy(model, four_bits)
        return twins[four_bits]


def _quantized_copy(model: PreTrainedModel, four_bits: bool) -> PreTrainedModel:
    twin = sharing_copy(model)
    with torch.inference_mode(False):  # or the quantized weights would be of use there only
        for parent in list(twin.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    packed = packed_if_exact(child.weight) if four_bits else None
                    layer = Int8Linear(child) if packed is None else Int4Linear(child, packed)
                    setattr(parent, name, layer)
            layers = [getattr(parent, name, None) for name in ("q_proj", "k_proj", "v_proj")]
            projections = [layer for layer in layers if isinstance(layer, Int8Linear)]
            if len(projections) == len(layers):
                parent.qkv_proj = Int8Projections(*projections)
    return twin


def int8_nbytes(model: PreTrainedModel) -> int:
    """Bytes that a twin takes beside the model's own weights."""
    layers = [module for module in model.modules() if isinstance(module, FewBitLinear)]
    return sum(buffer.nbytes for layer in layers for buffer in layer.buffers())


def require_int8(model: PreTrainedModel) -> None:
    """Raises InvalidParameterError where torch has no int8 product for this model's device."""
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise InvalidParameterError(
            f"drafter_quantization='int8' serves on a CPU, but the drafter is on {model.device}; "
            "load a drafter quantized for that device (bitsandbytes or torchao, through "
            "transformers' quantization_config), pass it as drafter= and leave "
            "drafter_quantization out"
        )


def int8_pays(model: PreTrainedModel) -> bool:
    """Whether int8 weights make a step of this model cheaper: in bfloat16 on a CPU.

    In float32 and float16 torch's operator is no faster than a plain product.
    """
    return all(p.device.type == "cpu" and p.dtype == torch.bfloat16 for p in model.parameters())
