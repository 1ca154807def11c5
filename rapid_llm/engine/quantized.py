"""Quantized copies of a model for drafting: base classes of layers, and one copy per model.

The layers are in :mod:`rapid_llm.engine.cpu.int8`, :mod:`rapid_llm.engine.cpu.blocks` and
:mod:`rapid_llm.engine.cuda.int4`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from rapid_llm.engine.model_state import ModelState
from rapid_llm.errors import InvalidParameterError
from rapid_llm.forked import ProcessLock

MAX_QUANTIZED_ROWS = 8
"""Number of tokens up to which a layer uses its quantized weights.

For more tokens the original weights are as fast.
"""


class QuantizedWeights(nn.Module):
    """A module whose buffers are quantized weights, in addition to the original ones."""


class QuantizedLinear(QuantizedWeights):
    """A linear layer with quantized weights for few tokens and the original ones for many.

    Args:
        linear: original layer.

    Attributes:
        weight, bias: tensors of the original layer, shared; faster for a prefill.
        stands_for: type of the original layer.
        added: names of the tensors that the original layer lacks.
        divides: required divisor of the number of inputs.
    """

    stands_for = nn.Linear
    added: tuple[str, ...] = ()
    divides = 1

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias


@dataclass(frozen=True)
class _Copy:
    """A quantized copy, and the state of the model that it was made from."""

    model: PreTrainedModel
    made_of: tuple[Any, ...]


_copies: WeakKeyDictionary[PreTrainedModel, dict[Hashable, _Copy]] = WeakKeyDictionary()
_making = ProcessLock()


def copy_of(
    model: PreTrainedModel,
    state: ModelState,
    kind: Hashable,
    make: Callable[[PreTrainedModel], PreTrainedModel],
) -> PreTrainedModel:
    """Quantized copy of a model's current state, made once per kind and freed with the model.

    Args:
        model: original model.
        state: state of the model.
        kind: key of the kind of copy.
        make: function that makes the copy.

    Raises:
        InvalidParameterError: the model has hooks or replaced methods, which a copy would lack.
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
        copies = _copies.setdefault(model, {})
        if kind not in copies or copies[kind].made_of != made_of:
            copies[kind] = _Copy(make(model), made_of)
        return copies[kind].model


def quantized_nbytes(model: PreTrainedModel) -> int:
    """Bytes of a copy's quantized weights, without the shared original ones."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedWeights)]
    return sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
