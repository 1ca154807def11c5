"""Weights of few bits for a drafter: less than half the bytes that a draft step reads.

The products are torch's own, with one scale an output row, ``w ≈ scale * round(w / scale)`` and
``scale = max|w| / 127``, or the compiled kernels', with one for 32 weights. What a checkpoint was
quantized to is then found again in its weights: GGUF's Q8_0, and Q4_1, whose layers can be 4 bits
in the drafter too. They are then as near to the file as bfloat16 is; a row's one scale is 1 % off.
Activations stay in the model's dtype, or become 16-bit whole numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rapid_llm.engine.identity import ModelState
from rapid_llm.engine.products import linear
from rapid_llm.errors import InvalidParameterError
from rapid_llm.models import sharing_copy

FEW_ROWS = 8
"""Up to so many tokens PyTorch's int8 product reads less than it computes more; the compiled
kernels' do so for all that they take."""


class FewBits(nn.Module):
    """A module whose buffers are weights of few bits, beside those that it was made from."""


class FewBitLinear(FewBits):
    """A linear layer that multiplies few tokens with weights of few bits, many with its own.

    Attributes:
        weight, bias: the layer's it was made from, shared; a prefill is faster with these.
        stands_for: the type of that layer.
        made_anew: the tensors that it did not have.
        divides: how many inputs the product takes at a time: it reads beyond any other number.
    """

    stands_for = nn.Linear
    made_anew: tuple[str, ...] = ()
    divides = 1

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

    made_anew = ("int8", "scale")
    divides = 16
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


class BlockLinear(FewBitLinear):
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

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        blocks = four_bits_if_exact(linear.weight)
        self.bits = 8 if blocks is None else 4
        blocks = eight_bits(linear.weight) if blocks is None else blocks
        self.register_buffer("blocks", blocks, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        few = x.numel() // x.shape[-1] <= FEW_ROWS
        weight = unpacked(self.blocks, self.bits)[: self.weight.shape[0]] if few else self.weight
        return linear(x, weight.to(x.dtype), self.bias)


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


class Int8Projections(nn.Module):
    """Query, key and value of one attention layer as one product, where tokens are few.

    The layers' int8 weights become views of one tensor, so that nothing is stored twice.
    """

    stands_for = None

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


@dataclass(frozen=True)
class _Twin:
    """A quantized copy, and what it was made of."""

    model: PreTrainedModel
    made_of: tuple[Any, ...]


_twins: WeakKeyDictionary[PreTrainedModel, dict[Hashable, _Twin]] = WeakKeyDictionary()
_making = threading.Lock()


def twin_of(
    model: PreTrainedModel,
    state: ModelState,
    kind: Hashable,
    make: Callable[[PreTrainedModel], PreTrainedModel],
) -> PreTrainedModel:
    """A quantized copy of a model as it is: made once for each kind, freed with the model.

    Raises:
        InvalidParameterError: the model has hooks or replaced methods, which belong to it alone.
    """
    with _making:
        state.take_samples()
        if not state.copyable:
            raise InvalidParameterError(
                f"{type(model).__name__} has hooks, replaced methods, layers or tensors of its own "
                "kind, of which there is no quantized copy; remove them, or leave "
                "drafter_quantization out"
            )
        made_of = state.contents
        twins = _twins.setdefault(model, {})
        if kind not in twins or twins[kind].made_of != made_of:
            twins[kind] = _Twin(make(model), made_of)
        return twins[kind].model


def int8_twin(
    model: PreTrainedModel, blocks: bool = False, state: ModelState | None = None
) -> PreTrainedModel:
    """The same model with int8 linear layers; every weight of its own is shared, not copied.

    Layers stay as they are where a row's length does not suit the product, or where they are no
    plain linear layers: so an adapter is in the twin, and its base is quantized.

    Args:
        model: to be quantized.
        blocks: in blocks for the compiled kernels, which take a model of which every dimension
            but the vocabulary's is a multiple of 32; of 4 bits where the weights hold no more.
        state: the model's, if there is one, to tell whether it has changed.

    Raises:
        InvalidParameterError: the model has hooks or replaced methods, which belong to it alone.
    """
    kind = BlockLinear if blocks else Int8Linear
    state = ModelState(model) if state is None else state
    return twin_of(model, state, kind, lambda model: _quantized_copy(model, kind))


def _quantized_copy(model: PreTrainedModel, kind: type[FewBitLinear]) -> PreTrainedModel:
    twin = sharing_copy(model)
    with torch.inference_mode(False):  # or the quantized weights would be of use there only
        for parent in list(twin.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and child.weight.shape[1] % kind.divides == 0:
                    setattr(parent, name, kind(child))
            layers = [getattr(parent, name, None) for name in ("q_proj", "k_proj", "v_proj")]
            projections = [layer for layer in layers if isinstance(layer, Int8Linear)]
            if len(projections) == len(layers):
                parent.qkv_proj = Int8Projections(*projections)
    return twin


def int8_nbytes(model: PreTrainedModel) -> int:
    """Bytes that a twin takes beside the model's own weights."""
    layers = [module for module in model.modules() if isinstance(module, FewBits)]
    return sum(buffer.nbytes for layer in layers for buffer in layer.buffers())


def require_int8(model: PreTrainedModel) -> None:
    """Raises InvalidParameterError where torch has no int8 product for this model's device."""
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise InvalidParameterError(
            f"drafter_quantization='int8' serves on a CPU, but the drafter is on {model.device}; "
            "take 'int4' for CUDA, or load a drafter quantized for that device (bitsandbytes or "
            "torchao, through transformers' quantization_config), pass it as drafter= and leave "
            "drafter_quantization out"
        )


def int8_pays(model: PreTrainedModel) -> bool:
    """Whether int8 weights make a step of this model cheaper: in bfloat16 on a CPU.

    In float32 and float16 torch's operator is no faster than a plain product.
    """
    return all(p.device.type == "cpu" and p.dtype == torch.bfloat16 for p in model.parameters())
