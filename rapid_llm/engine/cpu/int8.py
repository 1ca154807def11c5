"""Linear layers with int8 weights, multiplied by PyTorch's operator.

There is one scale per output row: ``w ≈ scale * round(w / scale)``, ``scale = max|w| / 127``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rapid_llm.engine.cpu.products import linear
from rapid_llm.engine.quantized import MAX_QUANTIZED_ROWS, QuantizedLinear


class Int8Linear(QuantizedLinear):
    """A linear layer with int8 weights for few tokens and the original ones for many.

    Attributes:
        int8: quantized weights, int8 ``[out, in]``.
        scale: scale of each row, ``[out]`` in the weight's dtype.
    """

    added = ("int8", "scale")
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
        if rows.shape[0] > MAX_QUANTIZED_ROWS:
            return linear(x, self.weight, self.bias)
        out = torch.ops.aten._weight_int8pack_mm(rows, self.int8, self.scale)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], -1)


class Int8Projections(nn.Module):
    """Query, key and value projections of an attention layer in one product, for few tokens.

    The layers' int8 weights become views of one tensor, so that nothing is stored twice.

    Args:
        layers: the projections, in order.
    """

    stands_for = None

    def __init__(self, *layers: Int8Linear) -> None:
        super().__init__()
        self._layers = layers  # a tuple, so that they are not registered: they have a parent
        self._sizes = [layer.int8.shape[0] for layer in layers]
        for name in ("int8", "scale"):
            together = torch.cat([getattr(layer, name) for layer in layers])
            self.register_buffer(f"_{name}", together, persistent=False)
            for layer, part in zip(layers, together.split(self._sizes), strict=True):
                setattr(layer, name, part)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the layers, ``[n, out]`` each, for inputs ``[n, hidden]``."""
        if x.shape[0] > MAX_QUANTIZED_ROWS:
            return tuple(layer(x) for layer in self._layers)
        product = torch.ops.aten._weight_int8pack_mm(x, self._int8, self._scale)
        parts = product.split(self._sizes, dim=-1)
        return tuple(
            part if layer.bias is None else part + layer.bias
            for part, layer in zip(parts, self._layers, strict=True)
        )
