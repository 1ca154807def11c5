"""What each kind of device does its own way.

:class:`Device` is any that PyTorch knows, by PyTorch's operators. Those with code of their own have
a folder each, ``engine/cpu`` and ``engine/cuda``, and are registered in
:mod:`rapid_llm.engine.model_runner`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid_llm.engine import sdpa

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rapid_llm.engine.identity import ModelState
    from rapid_llm.engine.kv_cache import KVCache

WeightKind = Literal["int8", "int4"]
"""Kinds of weights that a draft step reads faster than a model's own."""

FEW_TOKENS = 16
"""Tokens that every device's passes for decoding take; more are read as a prompt is."""


class Pass(Protocol):
    """One way to run a model over our cache, which gives what the model's own forward does.

    It belongs to the model as it was when the pass was made.
    """

    def serves(self, ids: Tensor, cache: KVCache, keep: int) -> bool:
        """Whether it takes these arguments of a call."""

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache, keep: int) -> Tensor:
        """Append tokens to the cache.

        Args:
            ids: int64 ``[n]``, on the model's device.
            positions: int64 ``[n]``; one more may follow, the last position of the sequence that
                is being read, on which some kinds of rotary scaling depend.
            cache: has room for n more tokens.
            keep: for how many of the last tokens logits are computed, 1 to n.

        Returns:
            ``[keep, vocab]``, in float32 or the model's dtype.
        """


class TokenSampler(Protocol):
    """How a draft step goes from logits to a token, where no history counts. Hashable.

    Attributes:
        width: tokens that q is over.
    """

    @property
    def width(self) -> int: ...

    def __call__(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Float32 ``[1, vocab]`` to q, float32 ``[width]``, and an int64 scalar drawn from it."""


class Judge(Protocol):
    """How a target goes from logits to what it keeps of a draft, where no history counts. Hashable.

    It never waits for the device.

    Attributes:
        width: tokens that logits and q are over.
    """

    @property
    def width(self) -> int: ...

    def __call__(
        self,
        logits: Tensor,
        draft: Tensor,
        q: Tensor,
        eta: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """What the host must know of a round.

        Args:
            logits: float32 ``[γ+1, vocab]``, at every drafted position and the one after them.
            draft: int64 ``[γ]``; γ may be 0.
            q: float32 ``[γ, vocab]`` or ``[γ+1, vocab]``.
            eta: float32 ``[len(q), 1]``, η of each position where it is not always the same.
            generator: draws.

        Returns:
            int64, of a length that follows from the arguments' shapes.
        """


DraftLoop = Callable[[Tensor, int, "KVCache", torch.Generator], tuple[Tensor, Tensor]]
"""``(pending, steps, cache, generator)`` to the drafted tokens, int64 ``[at most steps]``, and the
q that each was drawn from, float32 ``[…, width]``."""


Verification = Callable[[Tensor, Tensor, Tensor | None, "KVCache", torch.Generator], Tensor]
"""``(tokens, q, eta, cache, generator)`` to what a :class:`Judge` says; ``tokens`` are int64
``[γ+1]``: one that was not read, and the draft after it."""


@runtime_checkable
class ReplayedPass(Pass, Protocol):
    """A pass that is launched as one, so fast that the model is looked at while it runs.

    Positions follow from the cache, on the device; those that are passed on are not read.
    """

    def loop(self, choice: TokenSampler) -> DraftLoop:
        """Draft steps that feed one another without the host."""

    def verification(self, judge: Judge) -> Verification:
        """Passes that end with a verdict on what they read, without the host."""


class Quantizer(Protocol):
    """Makes copies of models with one kind of weights of few bits."""

    def require(self, model: PreTrainedModel, name: str, passes: Sequence[Pass]) -> None:
        """Raises InvalidParameterError where it cannot; ``name`` is what errors call the model."""

    def pays(self, model: PreTrainedModel, passes: Sequence[Pass]) -> bool:
        """Whether a step of this model becomes cheaper."""

    def copy(
        self, model: PreTrainedModel, state: ModelState, passes: Sequence[Pass]
    ) -> PreTrainedModel:
        """The copy: every weight of the model's own is shared.

        Args:
            model: that :meth:`require` accepts, on a device of the quantizer's kind.
            state: the model's.
            passes: what can run it, the fastest first.

        Raises:
            InvalidParameterError: the model has hooks or replaced methods, which it alone has.
        """


class Device:
    """A kind of device.

    Attributes:
        quantizers: how a drafter is given weights of few bits, by their kind; the fastest first.
        prefill_chunk: tokens that a prefill pass reads. It bounds the activations.
        prefill_pieces: tokens that passes over the rest of a prompt read, descending; less than a
            chunk. The smallest is about what the next question on a document reads again of it:
            see :mod:`rapid_llm.engine.chunks`.
    """

    quantizers: ClassVar[Mapping[WeightKind, Quantizer]] = {}
    prefill_chunk = 512
    prefill_pieces: tuple[int, ...] = ()

    def passes(self, model: Any, state: ModelState, cuda_graphs: bool | None) -> list[Pass]:
        """Passes over a lean model's weights that are faster than :class:`.lean.LeanPass`.

        The fastest first.

        Args:
            model: lean, see :func:`rapid_llm.engine.lean.is_lean`.
            state: the model's; to be told of what a pass does to the model.
            cuda_graphs: whether passes may be captured; None where they can be.
        """
        return []

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None
    ) -> sdpa.Kernel:
        """The fastest kernel for these arguments of :func:`rapid_llm.engine.attention.attend`."""
        return sdpa.attend

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: ``[..., in]`` with ``[out, in]`` and ``[out]``, in x's dtype."""
        return F.linear(x, weight, bias)

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which matrix products of several rows are fastest: the given, or float32."""
        return dtype

    def capacity_for(self, tokens: int) -> int:
        """Tokens that a cache for so many is best made for."""
        return tokens

    def upload(self, tokens: Tensor, device: torch.device) -> Tensor:
        """A tensor of the host on the device; the host does not wait."""
        return tokens.to(device)

    def synchronize(self, device: torch.device) -> None:
        """Wait until the device has done what it was given."""

    def rounding(self, device: torch.device) -> str:
        """Names what decides how its passes round, beside the sizes of the passes."""
        return device.type


_devices: dict[str, Device] = {}
_any = Device()


def register(kind: str, device: Device) -> None:
    """Let tensors on devices of a kind (``torch.device.type``) be computed so."""
    _devices[kind] = device


def device_of(place: torch.device) -> Device:
    """How things are done there."""
    return _devices.get(place.type, _any)
