"""Copies of a model whose linear layers have weights of few bits, for drafting.

What the layers are is a device's own: :mod:`rapid_llm.engine.cpu.int8`, :mod:`.cpu.blocks` and
:mod:`rapid_llm.engine.cuda.int4`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from rapid_llm.engine.identity import ModelState
from rapid_llm.errors import InvalidParameterError

MAX_QUANTIZED_ROWS = 8
"""Tokens up to which a layer multiplies with its weights of few bits; more are computed as fast
with its own."""


class QuantizedWeights(nn.Module):
    """A module whose buffers are weights of few bits, beside those that it was made from."""


class QuantizedLinear(QuantizedWeights):
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


@dataclass(frozen=True)
class _Copy:
    """A quantized copy, and what it was made of."""

    model: PreTrainedModel
    made_of: tuple[Any, ...]


_copies: WeakKeyDictionary[PreTrainedModel, dict[Hashable, _Copy]] = WeakKeyDictionary()
_making = threading.Lock()


def copy_of(
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
        copies = _copies.setdefault(model, {})
        if kind not in copies or copies[kind].made_of != made_of:
            copies[kind] = _Copy(make(model), made_of)
        return copies[kind].model


def quantized_nbytes(model: PreTrainedModel) -> int:
    """Bytes that a copy takes beside the model's own weights."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedWeights)]
    return sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
