"""A loaded model as a function: token ids and a cache in, logits out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from rapid_llm.engine import attention
from rapid_llm.engine.graphs import GraphedStep, is_capturable
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.lean import is_lean, lean_logits
from rapid_llm.engine.native_pass import native_pass
from rapid_llm.errors import MissingDependencyError, ModelError

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

_locks: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()


def _lock_of(model: PreTrainedModel) -> threading.RLock:
    """One lock a model, however many decoders were built around it."""
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


class Forward:
    """Runs a model over our cache: a lean forward pass where there is one, or its own.

    Args:
        model: a decoder-only transformers model.
        name: what errors and results call it.
        attn_implementation: ``rapid`` (ours), or one of transformers' own, which always runs
            the model's own forward pass.
        cuda_graphs: replay single-token passes from a CUDA graph, where the forward pass is lean
            and can be captured.

    Raises:
        ModelError: the architecture or the attention implementation is not supported.
        MissingDependencyError: the attention implementation is not installed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        attn_implementation: str = attention.NAME,
        cuda_graphs: bool = False,
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
            cuda_graphs and self.device.type == "cuda" and self.lean and is_capturable(model)
        )
        self._steps: WeakKeyDictionary[KVCache, GraphedStep] = WeakKeyDictionary()
        self._native = native_pass(model) if self.lean else None
        self.lock = _lock_of(model)  # held by a pass: whoever holds it has the model alone

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

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for ``capacity`` tokens; its memory is taken at the first pass."""
        return KVCache(self.config.num_hidden_layers, capacity)

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
        first = start + cache.skipped
        positions = torch.arange(first, first + ids.shape[0], device=self.device)
        run = self._lean_pass if self.lean else self._own_pass
        try:
            with self.lock:
                return run(ids, positions, cache, keep_logits).float()
        except BaseException:
            cache.rollback(start)
            raise

    def _lean_pass(self, ids: Tensor, positions: Tensor, cache: KVCache, keep: int) -> Tensor:
        if self._captures and len(ids) == 1 and cache.length > 0:
            return self._graphed(cache)(ids, cache)
        if self._native is not None and self._native.serves(ids, cache):
            return self._native(ids, positions, cache, keep)
        return lean_logits(self.model, ids, positions, cache, keep)

    def _graphed(self, cache: KVCache) -> GraphedStep:
        """The captured step of a cache; captured anew when the cache has grown."""
        step = self._steps.get(cache)
        if step is None or not step.serves(cache):
            step = self._steps[cache] = GraphedStep(self.model, cache)
        return step

    def _own_pass(self, ids: Tensor, positions: Tensor, cache: KVCache, keep: int) -> Tensor:
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
