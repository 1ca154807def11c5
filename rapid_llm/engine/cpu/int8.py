"""A drafter with int8 weights on a CPU: half the bytes that a draft step reads.

The products are torch's own, with one scale an output row, ``w ≈ scale * round(w / scale)`` and
``scale = max|w| / 127``, or those of the compiled kernels (:mod:`rapid_llm.engine.cpu.blocks`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rapid_llm.engine.cpu.blocks import BlockLinear
from rapid_llm.engine.cpu.compiled import CompiledPass
from rapid_llm.engine.cpu.products import linear
from rapid_llm.engine.device import Pass
from rapid_llm.engine.identity import ModelState
from rapid_llm.engine.quantized import FEW_ROWS, FewBitLinear, twin_of
from rapid_llm.errors import InvalidParameterError
from rapid_llm.models import sharing_copy


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


def twin(model: PreTrainedModel, state: ModelState, passes: Sequence[Pass] = ()) -> PreTrainedModel:
    """As :meth:`rapid_llm.engine.quantized.Quantizer.twin`: in blocks for the compiled pass."""
    return int8_twin(model, any(isinstance(each, CompiledPass) for each in passes), state)


def require(model: PreTrainedModel, name: str) -> None:
    """Raises InvalidParameterError where torch has no int8 product for this model's device."""
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise InvalidParameterError(
            f"drafter_quantization='int8' serves on a CPU, but {name} is on {model.device}; "
            "take 'int4' for CUDA, or load a drafter quantized for that device (bitsandbytes or "
            "torchao, through transformers' quantization_config), pass it as drafter= and leave "
            "drafter_quantization out"
        )


def pays(model: PreTrainedModel) -> bool:
    """Whether int8 weights make a step of this model cheaper: in bfloat16 on a CPU.

    In float32 and float16 torch's operator is no faster than a plain product.
    """
    return all(p.device.type == "cpu" and p.dtype == torch.bfloat16 for p in model.parameters())
