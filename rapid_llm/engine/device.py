"""The interface of devices: passes, attention kernels, matrix products and quantizers.

:class:`Device` itself uses PyTorch's operators, and serves any device. Devices with code of their
own are in ``engine/cpu`` and ``engine/cuda``, and are registered in
:mod:`rapid_llm.engine.model_runner`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid_llm.engine import sdpa

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rapid_llm.engine.kv_cache import KVCache
    from rapid_llm.engine.model_state import ModelState
    from rapid_llm.engine.parts import Part

WeightKind = Literal["int8", "int4"]
"""Formats of quantized weights for drafting."""

FEW_TOKENS = 16
"""Number of tokens up to which all devices have passes for decoding."""


def mask_words(vocab_size: int) -> int:
    """Number of int32 words of a mask, which has a bit for each token."""
    return -(-vocab_size // 32)


class Pass(Protocol):
    """An implementation of a model's forward pass over our KV cache.

    It computes what the model's own forward does, for the model as it was when the pass was made.
    """

    def serves(self, ids: Tensor, cache: KVCache, keep: int) -> bool:
        """Whether it supports a call with these arguments."""

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache, keep: int) -> Tensor:
        """Run the model on new tokens and append their KV to the cache.

        Args:
            ids: token ids, int64 ``[n]`` on the model's device.
            positions: positions of the tokens, int64 ``[n]``. One more may follow: the last
                position of the whole sequence, on which some kinds of rotary scaling depend.
            cache: KV cache with room for n more tokens.
            keep: number of last tokens for which logits are computed, 1 to n.

        Returns:
            Logits ``[keep, vocab]`` in float32 or the model's dtype.
        """


@runtime_checkable
class JoinedPass(Pass, Protocol):
    """A pass that also reads new tokens of several sequences at once."""

    def joins(self, parts: Sequence[Part]) -> bool:
        """Whether it supports a joined pass with these arguments."""

    def joined(self, parts: Sequence[Part]) -> list[Tensor]:
        """Run a model with a fixed rotary embedding on new tokens of several sequences.

        Args:
            parts: new tokens and caches, in an order of :func:`.joined.sharing_order`; those that
                borrow have buffers.

        Returns:
            For each part logits ``[keep, vocab]`` in float32 or the model's dtype.
        """


class TokenSampler(Protocol):
    """Samples a token from the logits of a draft step, without history. Hashable.

    Attributes:
        width: vocabulary size of q.
    """

    @property
    def width(self) -> int: ...

    def __call__(
        self, logits: Tensor, generator: torch.Generator, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample a token.

        Args:
            logits: float32 ``[1, vocab]``.
            generator: random generator on their device.
            mask: a bit for each token that may be sampled, int32 ``[1, width / 32]``; None for all.

        Returns:
            q, float32 ``[width]``, and a token drawn from it, an int64 scalar.
        """


class Judge(Protocol):
    """Verifies a draft from the target's logits, without history. Hashable.

    It never waits for the device.

    Attributes:
        width: vocabulary size of logits and q.
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
        mask: Tensor | None = None,
    ) -> Tensor:
        """Verify a draft.

        Args:
            logits: the target's logits at all drafted positions and the one after them, float32
                ``[γ+1, vocab]``.
            draft: drafted tokens, int64 ``[γ]``; γ may be 0.
            q: probabilities of the drafter, float32 ``[γ, vocab]`` or ``[γ+1, vocab]``.
            eta: η of each position, float32 ``[len(q), 1]``; None for a constant η.
            generator: random generator on the logits' device.
            mask: a bit for each token that may stand at a position, int32 ``[γ+1, width / 32]``;
                None for all.

        Returns:
            The verdict for the host, int64, of a length that follows from the arguments' shapes.
        """


NextMask = Callable[[list[int]], Tensor | None]
"""Function of the tokens that a draft loop has drafted; it returns the mask of the next token.

The mask is int32 ``[1, width / 32]``, see :class:`TokenSampler`. None ends the draft.
"""

DraftLoop = Callable[
    [Tensor, int, "KVCache", torch.Generator, NextMask | None], tuple[Tensor, Tensor]
]
"""Function of ``(pending, steps, cache, generator, masks)`` that drafts at most ``steps`` tokens.

It returns the tokens, int64 ``[at most steps]``, and the q that each was drawn from, float32
``[…, width]``. ``masks`` is called before each step, after the host has waited for the last one.
"""


Verification = Callable[
    [Tensor, Tensor, Tensor | None, "KVCache", torch.Generator, Tensor | None], Tensor
]
"""Function of ``(tokens, q, eta, cache, generator, mask)`` that returns a :class:`Judge`'s verdict.

``tokens`` are int64 ``[γ+1]``: one that is not in the cache yet, and the draft after it.
"""


@runtime_checkable
class ReplayedPass(Pass, Protocol):
    """A pass replayed from a CUDA graph, with draft loops and verification on the device.

    It is so short that changes to the model are checked while it runs. Positions are derived from
    the cache on the device; the argument ``positions`` is ignored.
    """

    def loop(self, choice: TokenSampler) -> DraftLoop:
        """The draft loop for a sampler: draft steps in sequence without the host."""

    def verification(self, judge: Judge) -> Verification:
        """The verification for a judge: a pass over a draft and its verdict without the host."""


class Quantizer(Protocol):
    """Makes copies of models with one format of quantized weights."""

    def require(self, model: PreTrainedModel, name: str, passes: Sequence[Pass]) -> None:
        """Check that a model can be quantized.

        Args:
            model: the model.
            name: name of the model in errors.
            passes: passes that can run it, the fastest first.

        Raises:
            InvalidParameterError: the model or its device does not support the format.
        """

    def pays(self, model: PreTrainedModel, passes: Sequence[Pass]) -> bool:
        """Whether quantization makes a step of this model faster."""

    def copy(
        self, model: PreTrainedModel, state: ModelState, passes: Sequence[Pass]
    ) -> PreTrainedModel:
        """Make a quantized copy that also shares all of the model's own weights.

        Args:
            model: model that :meth:`require` accepts, on a device of the quantizer's kind.
            state: state of the model.
            passes: passes that can run it, the fastest first.

        Raises:
            InvalidParameterError: the model has hooks or replaced methods, which a copy would lack.
        """


class Device:
    """A kind of device; this one uses PyTorch's operators.

    Attributes:
        quantizers: quantizers for drafters by weight format, the fastest first.
        prefill_chunk: number of tokens of a prefill pass, which bounds the memory of activations.
        prefill_pieces: numbers of tokens of passes over the rest of a prompt, descending, less
            than a chunk. The next question on a document reads about the smallest of them again,
            see :mod:`rapid_llm.engine.chunks`.
        own_memory: whether it has memory separate from the host's.
    """

    own_memory: ClassVar[bool] = False
    quantizers: ClassVar[Mapping[WeightKind, Quantizer]] = {}
    prefill_chunk = 512
    prefill_pieces: tuple[int, ...] = ()

    def passes(self, model: Any, state: ModelState, cuda_graphs: bool | None) -> list[Pass]:
        """Passes for a lean model that are faster than :class:`.LeanPass`, the fastest first.

        Args:
            model: lean model, see :func:`rapid_llm.engine.lean.is_lean`.
            state: state of the model, to be updated if making a pass changes the model.
            cuda_graphs: whether passes are captured in CUDA graphs; None where possible.
        """
        return []

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None
    ) -> sdpa.Kernel:
        """Fastest kernel for these arguments of :func:`rapid_llm.engine.attention.attend`."""
        return sdpa.attend

    def attend_part(self, query: Tensor, value: Tensor) -> sdpa.PartKernel:
        """Fastest kernel for these arguments of :func:`rapid_llm.engine.sdpa.attend_part`."""
        return sdpa.attend_part

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: ``[..., in]`` with ``[out, in]`` and ``[out]``, in x's dtype."""
        return F.linear(x, weight, bias)

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Fastest dtype for matrix products of several rows: the given one, or float32."""
        return dtype

    def capacity_for(self, tokens: int) -> int:
        """Best capacity, in tokens, of a cache for at least ``tokens`` tokens."""
        return tokens

    def upload(self, tokens: Tensor, device: torch.device) -> Tensor:
        """Copy a tensor from the host to the device, without waiting."""
        return tokens.to(device)

    def synchronize(self, device: torch.device) -> None:
        """Wait until all work on the device is done."""

    def host_buffer(self, nbytes: int) -> Tensor:
        """Uninitialized host memory for :meth:`transfer`, uint8 ``[nbytes]``.

        Raises:
            RuntimeError: there is too little memory.
        """
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def free_host_buffers(self) -> None:
        """Return the memory of unused host buffers to the system."""

    def queued(self, device: torch.device) -> object:
        """Marker of the work that this thread has queued on the device, for :meth:`transfer`."""
        return None

    def transfer(
        self, pairs: Iterable[tuple[Tensor, Tensor]], device: torch.device, after: object
    ) -> None:
        """Copy tensors between the device and host buffers, in parallel to the device's passes.

        It returns once they are copied.

        Args:
            pairs: sources and targets, contiguous and of the same size each.
            device: the device.
            after: marker of the work that must end before the copies, from :meth:`queued`.
        """
        for source, target in pairs:
            target.copy_(source)

    def kernels(self, device: torch.device) -> Mapping[str, str | None]:
        """Why kernels of this library do not serve on a device, by name; None where they do."""
        return {}

    def rounding(self, device: torch.device) -> str:
        """Description of everything that the rounding of passes depends on except their sizes."""
        return device.type


_devices: dict[str, Device] = {}
_any = Device()


def register(kind: str, device: Device) -> None:
    """Set the implementation for a kind of device (``torch.device.type``)."""
    _devices[kind] = device


def device_of(place: torch.device) -> Device:
    """The implementation for a device."""
    return _devices.get(place.type, _any)
