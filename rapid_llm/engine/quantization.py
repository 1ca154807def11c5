"""Int8 weights for a drafter: half the bytes that a draft step reads.

Weight-only and symmetric, one scale an output row: ``w ≈ scale * round(w / scale)`` with
``scale = max|w| / 127``. Activations stay in the model's dtype. The products are torch's own.
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


class Int8Linear(nn.Module):
    """A linear layer that multiplies few tokens with int8 weights, many with its own.

    Attributes:
        weight, bias: the layer's it was made from, shared; a prefill is faster with these.
        int8: int8 ``[out, in]``.
        scale: ``[out]`` in the weight's dtype.
    """

    int8: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
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


_twins: WeakKeyDictionary[PreTrainedModel, PreTrainedModel] = WeakKeyDictionary()
_making = threading.Lock()


def int8_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with int8 linear layers; every weight of its own is shared, not copied.

    One twin a model, freed with it.
    """
    with _making:
        twin = _twins.get(model)
        if twin is None:
            twin = _twins[model] = _int8_copy(model)
        return twin


def _int8_copy(model: PreTrainedModel) -> PreTrainedModel:
    twin = sharing_copy(model)
    with torch.inference_mode(False):  # or the int8 weights would be of use there only
        for parent in list(twin.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Int8Linear(child))
            layers = [getattr(parent, name, None) for name in ("q_proj", "k_proj", "v_proj")]
            projections = [layer for layer in layers if isinstance(layer, Int8Linear)]
            if len(projections) == len(layers):
                parent.qkv_proj = Int8Projections(*projections)
    return twin


def int8_nbytes(model: PreTrainedModel) -> int:
    """Bytes that a twin takes beside the model's own weights."""
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    return sum(layer.int8.nbytes + layer.scale.nbytes for layer in layers)


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
