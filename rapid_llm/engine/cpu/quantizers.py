"""Quantized copies of a model with 8-bit or 4-bit weights, for drafting on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from rapid_llm.engine.cpu.blocks import BlockLinear, Int4Blocks, Int8Blocks, four_bits_if_exact
from rapid_llm.engine.cpu.compiled import CompiledPass
from rapid_llm.engine.cpu.int8 import Int8Linear, Int8Projections
from rapid_llm.engine.device import Pass
from rapid_llm.engine.model_state import ModelState
from rapid_llm.engine.quantized import QuantizedLinear, copy_of
from rapid_llm.errors import InvalidParameterError
from rapid_llm.shared_weights import sharing_copy


class CPUQuantizer:
    """Quantizer for CPUs, see :class:`rapid_llm.engine.device.Quantizer`.

    Args:
        bits: bits per weight: 8, for any weights; or 4, for checkpoints of 4-bit weights such as
            GGUF's Q4_1 (layers with more bits get 8).
    """

    def __init__(self, bits: Literal[8, 4]) -> None:
        self._bits = bits

    def require(self, model: PreTrainedModel, name: str, passes: Sequence[Pass]) -> None:
        if self._bits == 4 and not (_is_compiled(passes) and _holds_four_bits(model)):
            raise InvalidParameterError(
                "drafter_quantization='int4' on a CPU needs the compiled kernels and a checkpoint "
                f"of 4-bit weights in bfloat16 (GGUF's Q4_1), which {name} is not; use 'int8'"
            )

    def pays(self, model: PreTrainedModel, passes: Sequence[Pass]) -> bool:
        # In float32 and float16 PyTorch's int8 operator is no faster than a plain product.
        if not all(
            p.device.type == "cpu" and p.dtype == torch.bfloat16 for p in model.parameters()
        ):
            return False
        return self._bits == 8 or (_is_compiled(passes) and _holds_four_bits(model))

    def copy(
        self, model: PreTrainedModel, state: ModelState, passes: Sequence[Pass]
    ) -> PreTrainedModel:
        blocks = Int4Blocks if self._bits == 4 else Int8Blocks
        return quantized_copy(model, blocks if _is_compiled(passes) else Int8Linear, state)


def quantized_copy(
    model: PreTrainedModel, kind: type[QuantizedLinear], state: ModelState | None = None
) -> PreTrainedModel:
    """A copy of a model with quantized linear layers, which shares the original weights.

    Layers of an unsuitable width, and modules other than plain linear layers, are not quantized. So
    the copy has the same adapters, over a quantized base.

    Args:
        model: the model.
        kind: class of the quantized layers: :class:`.int8.Int8Linear`, or blocks for the compiled
            pass.
        state: state of the model, if there is one.

    Raises:
        InvalidParameterError: the model has hooks or replaced methods, which a copy would lack.
    """
    state = ModelState(model) if state is None else state
    return copy_of(model, state, kind.__name__, lambda model: _copy(model, kind))


def _copy(model: PreTrainedModel, kind: type[QuantizedLinear]) -> PreTrainedModel:
    copy = sharing_copy(model)
    with torch.inference_mode(False):  # inference tensors could not be used outside that mode
        for parent in list(copy.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and child.weight.shape[1] % kind.divides == 0:
                    setattr(parent, name, kind(child))
            layers = [getattr(parent, name, None) for name in ("q_proj", "k_proj", "v_proj")]
            projections = [layer for layer in layers if isinstance(layer, Int8Linear)]
            if len(projections) == len(layers):
                parent.qkv_proj = Int8Projections(*projections)
    return copy


def _is_compiled(passes: Sequence[Pass]) -> bool:
    return any(isinstance(each, CompiledPass) for each in passes)


def _holds_four_bits(model: PreTrainedModel) -> bool:
    """Whether the first linear layer of a model has exact 4-bit weights."""
    head = model.get_output_embeddings()
    layers = (m for m in model.modules() if type(m) is nn.Linear and m is not head)
    first = next((m for m in layers if m.weight.shape[1] % BlockLinear.divides == 0), None)
    return first is not None and four_bits_if_exact(first.weight) is not None
