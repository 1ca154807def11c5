"""A loaded model as a function: token ids and a cache in, logits out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from rapid_llm.engine import attention
from rapid_llm.engine.cuda import has_kernels, int4
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.lean import has_fixed_rotary, is_lean, lean_logits
from rapid_llm.engine.native_pass import native_pass
from rapid_llm.engine.quantization import int8_pays, int8_twin, require_int8, twin_of
from rapid_llm.errors import InvalidParameterError, MissingDependencyError, ModelError

if TYPE_CHECKING:  # they need Triton, which not every machine has
    from rapid_llm.engine.cuda.captured import CapturedPasses
    from rapid_llm.engine.cuda.draft_loop import DraftLoops

SUPPORTED = frozenset(
    {
        "gemma3",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    }
)
"""``config.model_type`` of the architectures that the tests compare with their own forward."""

ATTENTION = (attention.NAME, "sdpa", "flash_attention_2", "eager")

FewBits = Literal["int8", "int4"]
"""Kinds of weights that a draft step reads faster than a model's own."""

_locks: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()


def _lock_of(model: PreTrainedModel) -> threading.RLock:
    """One lock a model, however many decoders were built around it."""
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


class Choice(Protocol):
    """How a draft step goes from logits to a token, where no history counts. Hashable.

    Attributes:
        width: tokens that q is over.
    """

    @property
    def width(self) -> int: ...

    def __call__(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Float32 ``[1, vocab]`` to q, float32 ``[width]``, and an int64 scalar drawn from it."""


class Forward:
    """Runs a model over our cache: a lean forward pass where there is one, or its own.

    Args:
        model: a decoder-only transformers model.
        name: what errors and results call it.
        attn_implementation: ``rapid`` (ours), or one of transformers' own, which always runs
            the model's own forward pass.
        cuda_graphs: whether passes of few tokens are replayed from CUDA graphs: None where they
            can be (a lean pass, on Ampere or newer, with Triton), False nowhere. True insists.

    Raises:
        ModelError: the architecture or the attention implementation is not supported.
        InvalidParameterError: ``cuda_graphs=True`` where passes cannot be captured.
        MissingDependencyError: the attention implementation is not installed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        attn_implementation: str = attention.NAME,
        cuda_graphs: bool | None = None,
    ) -> None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in SUPPORTED:
            raise ModelError(
                f"{name}: architecture {model_type!r} ({type(model).__name__}) is not supported, "
                f"because its cache could not be rolled back or was never checked; "
                f"supported are {', '.join(sorted(SUPPORTED))}"
            )
        if attn_implementation not in ATTENTION:
            raise ModelError(
                f"{name}: attn_implementation={attn_implementation!r} is unknown; "
                f"choose one of {', '.join(ATTENTION)}"
            )
        if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
            raise MissingDependencyError(
                f"{name}: attn_implementation='flash_attention_2' needs the package flash-attn and "
                "a CUDA device; install it, or use 'rapid' or 'sdpa'"
            )
        self.model = model.eval()
        self.name = name
        self.attn_implementation = attn_implementation
        self.config = model.config.get_text_config()
        if getattr(self.config, "use_bidirectional_attention", None):
            raise ModelError(f"{name} attends in both directions; a causal model is needed")
        self.lean = attn_implementation == attention.NAME and is_lean(model)
        self.cuda_graphs = cuda_graphs
        self._captures = (
            cuda_graphs is not False
            and self.lean
            and has_kernels(self.device)
            and has_fixed_rotary(model)
        )
        if cuda_graphs and not self._captures:
            raise InvalidParameterError(
                f"cuda_graphs=True, but passes of {name} on {self.device} cannot be captured: that "
                "takes a model of the Llama family with our attention, Triton, and an Ampere GPU "
                "or a newer one; leave cuda_graphs out to capture where it can be done"
            )
        self._captured: CapturedPasses | None = None
        self._loops: DraftLoops | None = None
        self._native = native_pass(model) if self.lean else None
        self._lock = _lock_of(model)

    @property
    def device(self) -> torch.device:
        """Where token ids go in (a model may be spread over several devices)."""
        return self.model.get_input_embeddings().weight.device

    @property
    def vocab_size(self) -> int:
        """Width of the logits; may be padded beyond the tokenizer's vocabulary."""
        return int(self.config.vocab_size)

    @property
    def context_window(self) -> int:
        """Positions that the model was made for, YaRN scaling included."""
        window = int(self.config.max_position_embeddings)
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "yarn":
            original = rope.get("original_max_position_embeddings") or window
            window = max(window, int(original * rope["factor"]))
        return window

    @property
    def slides(self) -> bool:
        """Whether some layer attends through a sliding window only."""
        types = getattr(self.config, "layer_types", None)
        if types is not None:
            return "sliding_attention" in types
        return getattr(self.config, "sliding_window", None) is not None

    @property
    def compiled(self) -> bool:
        """Whether few tokens are read by the compiled kernels."""
        return self._native is not None

    def require(self, kind: FewBits) -> None:
        """Raises InvalidParameterError where this model cannot have weights of so few bits."""
        if kind == "int8":
            require_int8(self.model)
        elif not int4.runs_on(self.model):
            raise InvalidParameterError(
                f"drafter_quantization='int4' needs a drafter in bfloat16 on an Ampere GPU or a "
                f"newer one, but {self.name} is in {self.model.dtype} on {self.device}; load it so "
                "(dtype='bfloat16'), or leave drafter_quantization out"
            )

    @property
    def cheapest(self) -> FewBits | None:
        """The kind of weights with which a draft step takes least, None for its own."""
        if int8_pays(self.model):
            return "int8"
        return "int4" if int4.runs_on(self.model) else None

    def quantized(self, kind: FewBits) -> Forward:
        """The same over weights of few bits, made when first asked for and freed with the model."""
        if kind == "int8":
            twin = int8_twin(self.model, blocks=self.compiled)
        else:
            lean = self.lean
            twin = twin_of(self.model, f"int4 {lean}", lambda m: int4.int4_copy(m, lean=lean))
        return Forward(twin, f"{self.name} ({kind})", self.attn_implementation, self.cuda_graphs)

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for ``capacity`` tokens; its memory is taken at the first pass."""
        return KVCache(self.config.num_hidden_layers, capacity)

    @property
    def loops(self) -> bool:
        """Whether :meth:`draft` can draft without the host."""
        return self._captures

    def draft(
        self,
        pending: Tensor,
        steps: int,
        cache: KVCache,
        choice: Choice,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Draft steps that feed one another on the device, where the model :attr:`loops`.

        See :class:`rapid_llm.engine.cuda.draft_loop.DraftLoop`, for the errors :meth:`__call__`.
        """
        start = cache.length
        try:
            with self._lock:
                return self._draft_loops().of(choice)(pending, steps, cache, generator)
        except BaseException:
            cache.rollback(start)
            raise

    def refresh(self) -> None:
        """Follow what was done to the model since: compiled passes hold on to its weights."""
        if self._native is not None and self._native.stale:
            self._native = native_pass(self.model) if is_lean(self.model) else None

    def __call__(self, tokens: Tensor, cache: KVCache, keep_logits: int) -> Tensor:
        """Append tokens to the cache.

        Args:
            tokens: int64 ``[n]`` on any device; they follow what the cache holds.
            cache: has room for n more tokens; left as it was if the pass fails.
            keep_logits: for how many of the last positions logits are computed, at least 1.

        Returns:
            float32 ``[keep_logits, vocab_size]``.
        """
        start = cache.length
        ids = tokens.to(self.device, non_blocking=True)
        run = self._lean_pass if self.lean else self._own_pass
        try:
            with self._lock:
                return run(ids, cache, keep_logits).float()
        except BaseException:
            cache.rollback(start)
            raise

    def _lean_pass(self, ids: Tensor, cache: KVCache, keep: int) -> Tensor:
        if self._captures and self._captured_passes().serves(ids, cache):
            return self._captured_passes()(ids, cache, keep)
        positions = self._positions(ids, cache)
        if self._native is not None and self._native.serves(ids, cache):
            return self._native(ids, positions, cache, keep)
        return lean_logits(self.model, ids, positions, cache, keep)

    def _captured_passes(self) -> CapturedPasses:
        if self._captured is None:
            from rapid_llm.engine.cuda.captured import CapturedPasses, GraphCapture

            self._captured = CapturedPasses(self.model, GraphCapture(self.device))
        return self._captured

    def _draft_loops(self) -> DraftLoops:
        if self._loops is None:
            from rapid_llm.engine.cuda.draft_loop import DraftLoops

            self._loops = DraftLoops(self._captured_passes())
        return self._loops

    def _positions(self, ids: Tensor, cache: KVCache) -> Tensor:
        first = cache.length + cache.skipped
        return torch.arange(first, first + ids.shape[0], device=self.device)

    def _own_pass(self, ids: Tensor, cache: KVCache, keep: int) -> Tensor:
        positions = self._positions(ids, cache)
        with self._attention():
            output = self.model(
                input_ids=ids[None],
                position_ids=positions[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        logits: Tensor = output.logits[0]
        return logits

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Our attention for one pass only: the caller's own use of the model must not change."""
        config: Any = self.config
        before = config._attn_implementation
        config._attn_implementation = self.attn_implementation
        try:
            yield
        finally:
            config._attn_implementation = before
