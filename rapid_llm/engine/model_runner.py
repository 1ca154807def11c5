"""Model runner: runs a loaded model over a KV cache, by the fastest pass that is exact for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rapid_llm.engine import attention, positions
from rapid_llm.engine.cpu.device import CPU
from rapid_llm.engine.cuda.device import CUDA
from rapid_llm.engine.device import JoinedPass, Pass, ReplayedPass, device_of, register
from rapid_llm.engine.joined import sharing_order
from rapid_llm.engine.kv_cache import KVCache, KVOrigin
from rapid_llm.engine.lean import has_fixed_rotary, is_lean
from rapid_llm.engine.lean_pass import LeanPass
from rapid_llm.engine.locks import lock_of
from rapid_llm.engine.model_state import ModelState
from rapid_llm.engine.parts import Part
from rapid_llm.engine.placement import input_device
from rapid_llm.engine.supported import (
    not_captured,
    require_layers_in_order,
    require_supported,
    require_tokens_alike,
)
from rapid_llm.engine.transformers_pass import TransformersPass
from rapid_llm.errors import ModelError, OutdatedKVError
from rapid_llm.tensor_parallel import is_sharded, ranks_of
from rapid_llm.tensor_parallel_plan import head_divisor

register("cpu", CPU())
register("cuda", CUDA())


class ModelRunner:
    """Runs a model over our KV cache, by our own passes where they are exact, or by its forward.

    Changes to the model take effect at the next call, see
    :class:`rapid_llm.engine.model_state.ModelState`. After edits that are not detected the user
    calls :meth:`RapidDecoder.clear_cache`.

    Args:
        model: decoder-only transformers model.
        name: name of the model in errors and results.
        attn_implementation: ``rapid`` (this library's), or one of transformers' own, with which the
            model's own forward always runs.
        cuda_graphs: whether passes of few tokens are replayed from CUDA graphs. None: where
            possible (lean models on Ampere or newer, with Triton); False: never; True: where it is
            not possible, or a capture fails, an error is raised instead of running more slowly.

    Attributes:
        ranks: processes that run each pass together, because this model or its partner (its
            drafter or target) is sharded over them; None for a model of this process alone.

    Raises:
        ModelError: the architecture, an adapter or the attention implementation is not supported.
            Calls raise it too, because adapters may be added later.
        InvalidParameterError: ``cuda_graphs=True`` where passes cannot be captured. Calls raise it
            too, where a capture fails.
        MissingDependencyError: the attention implementation is not installed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        attn_implementation: str = attention.NAME,
        cuda_graphs: bool | None = None,
    ) -> None:
        require_supported(model, name, attn_implementation)
        self.model = model
        self.name = name
        self.attn_implementation = attn_implementation
        self.config = model.config.get_text_config()
        self.cuda_graphs = cuda_graphs
        self.ranks = ranks_of(name, model)
        self._lock = lock_of(model)
        with self._lock:
            self.state = ModelState(model)
            self._select_passes()
        if cuda_graphs and self._replayed is None:
            raise not_captured(name, self.device)

    def _select_passes(self) -> None:
        """Make the passes for the model's current state, the fastest first; the last serves all."""
        self._chosen: int | None = None
        require_layers_in_order(self.model, self.name)
        require_tokens_alike(self.model, self.name)
        self._passes: list[Pass] = []
        self._lean = self.attn_implementation == attention.NAME and is_lean(self.state)
        # A model with scaled rotary embedding changes itself in a pass: see ModelState.absorb.
        self._static = self._lean and has_fixed_rotary(self.model)
        if self._lean:
            own = device_of(self.device).passes(self.model, self.state, self.cuda_graphs)
            self._passes += [*own, LeanPass(self.model)]
        self._passes.append(TransformersPass(self.model, self.state, self.attn_implementation))
        replayed = (each for each in self._passes if isinstance(each, ReplayedPass))
        self._replayed: ReplayedPass | None = next(replayed, None)
        self._joining = [each for each in self._passes if isinstance(each, JoinedPass)]
        self._chosen = self.state.number
        self._origin = KVOrigin(self.state.number, 0)

    def _refresh(self) -> None:
        """Select passes again if the model has changed; the caller has its lock."""
        if self.state.look() != self._chosen:
            self._select_passes()

    @property
    def lean(self) -> bool:
        """Whether our own passes are exact for the model's current state."""
        with self._lock:
            self._refresh()
            return self._lean

    @property
    def joins(self) -> bool:
        """Whether new tokens of several sequences can be read in one pass, see :meth:`joined`.

        Not those of a model that was made one that is refused; its passes say why.
        """
        with self._lock:
            try:
                self._refresh()
            except ModelError:
                return False
            return self._static and self.ranks is None

    @property
    def settings(self) -> list[tuple[str, str, Any]]:
        """Plain data in the model's modules and configs, such as its active adapter."""
        with self._lock:
            self._refresh()
            return self.state.settings

    @property
    def lock(self) -> threading.RLock:
        """Lock of the model, held during each pass."""
        return self._lock

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings (a model may be spread over several devices)."""
        return input_device(self.model)

    def tensor(self, tokens: Sequence[int]) -> Tensor:
        """Token ids as int64 ``[n]`` on :attr:`device`; the host does not wait for the copy."""
        host = torch.tensor(tokens, dtype=torch.long, device="cpu")
        return device_of(self.device).upload(host, self.device)

    @property
    def vocab_size(self) -> int:
        """Width of the logits; may be padded beyond the tokenizer's vocabulary."""
        head = self.model.get_output_embeddings()
        return int(getattr(head, "out_features", self.config.vocab_size))

    @property
    def context_window(self) -> int:
        """Context window in tokens, including YaRN scaling."""
        return positions.context_window(self.config)

    @property
    def slides(self) -> bool:
        """Whether any layer has a sliding window."""
        return positions.slides(self.config)

    @property
    def switches(self) -> list[int]:
        """Sequence lengths beyond which the rotary embedding changes for all positions.

        Longrope has one; KV of a shorter sequence is invalid beyond it.
        """
        return positions.switches(self.config)

    @property
    def copyable(self) -> bool:
        """Whether a copy of the model in its current state would compute the same."""
        with self._lock:
            self._refresh()
            return self.state.copyable

    @property
    def passes(self) -> Sequence[Pass]:
        """Passes that can run the model in its current state, the fastest first."""
        with self._lock:
            self._refresh()
            return tuple(self._passes)

    def origin(self, length: int) -> KVOrigin:
        """Origin of KV that the model's current state computes; other KV must not be used with it.

        Args:
            length: length of the whole sequence in tokens.

        Raises:
            ModelError: the rotary embedding changes with every token at this length, or an adapter
                is not supported.
        """
        with self._lock:
            self._refresh()
            return KVOrigin(self.state.number, self._scale(length))

    def _scale(self, length: int) -> int:
        return positions.scale(self.config, length, self.name)

    def kept_origin(self, length: int) -> KVOrigin | None:
        """Like :meth:`origin`, for KV that is kept between calls; also samples the weights.

        None where KV must not be kept, because results depend on injected code.
        """
        with self._lock:
            self.state.take_samples()
            origin = self.origin(length)
            return origin if self.state.traceable else None

    def capacity_for(self, tokens: int) -> int:
        """Best capacity, in tokens, of a cache for at least ``tokens`` tokens."""
        return device_of(self.device).capacity_for(tokens)

    @property
    def prefill_sizes(self) -> tuple[int, ...]:
        """Sizes of prefill passes in tokens, descending, see :mod:`rapid_llm.engine.chunks`."""
        device = device_of(self.device)
        return device.prefill_chunk, *device.prefill_pieces

    def synchronize(self) -> None:
        """Wait until all work on the device is done."""
        device_of(self.device).synchronize(self.device)

    @property
    def kv_shares(self) -> int:
        """Number of processes among which the KV heads are divided."""
        shared = self.ranks is not None and is_sharded(self.model) and head_divisor(self.config)
        return self.ranks.size if self.ranks is not None and shared else 1

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for ``capacity`` tokens; memory is allocated by the first pass."""
        return KVCache(self.config.num_hidden_layers, capacity)

    def __call__(self, tokens: Tensor, cache: KVCache, keep_logits: int) -> Tensor:
        """Run the model on new tokens and append their KV to the cache.

        Args:
            tokens: token ids after those in the cache, int64 ``[n]`` on any device.
            cache: KV cache with room for n more tokens; it does not change if the pass fails.
            keep_logits: number of last tokens for which logits are computed, 1 to n.

        Returns:
            Logits, float32 ``[keep_logits, vocab_size]``.

        Raises:
            OutdatedKVError: the cached KV was computed with another state of the model.
            ModelError: an unsupported adapter was added.
        """
        ids = tokens.to(self.device, non_blocking=True)
        if cache.prefix:
            return self.joined([Part(ids, cache, keep_logits)])[0]
        length = max(cache.expected, cache.length + cache.position_offset + ids.shape[0])

        with self.replaying(cache, ids.shape[0]) as replayed:
            if replayed is not None and replayed.serves(ids, cache, keep_logits):
                return replayed(ids, ids, cache, keep_logits).float()
        with self._pass_context((cache, length)):
            at = self._positions(ids, cache, length)
            run = next(p for p in self._passes if p.serves(ids, cache, keep_logits))
            if self.ranks is None:
                logits = run(ids, at, cache, keep_logits)
            else:
                details = ids.shape[0], cache.length, keep_logits
                with self.ranks.running(self.model, self.device, *details):
                    own = run(ids, at, cache, keep_logits)
                    logits = self.ranks.first_logits(own.to(self.device, torch.float32))
                    self.synchronize()  # time limits count from the launch
            return logits.to(self.device, torch.float32)

    def joined(self, parts: Sequence[Part]) -> list[Tensor]:
        """Run the model on new tokens of several sequences in one pass.

        Args:
            parts: new tokens and caches, with different caches. No cache changes if the pass fails.

        Returns:
            For each part logits, float32 ``[keep, vocab_size]``.

        Raises:
            OutdatedKVError: a cache was computed with another state of the model.
            ModelError: passes over several sequences are not known to be exact for the model.
        """
        planned = [(part.cache, part.position + len(part.ids)) for part in parts]
        late = self._replayed is not None and all(at.origin == self._origin for at, _ in planned)
        with self._pass_context(*planned, late=late):
            if not self._static or self.ranks is not None:
                raise ModelError(
                    f"{self.name} cannot read several sequences at once: that takes a model of the "
                    "Llama family with our attention and a fixed rotary embedding"
                )
            order = sharing_order(parts)
            arranged = [parts[index] for index in order]
            for part in parts:
                part.cache.allocate()
            run = next(each for each in self._joining if each.joins(arranged))
            logits = dict(zip(order, run.joined(arranged), strict=True))
            return [logits[index].float() for index in range(len(parts))]

    @contextmanager
    def replaying(
        self, cache: KVCache, new: int, generator: torch.Generator | None = None
    ) -> Iterator[ReplayedPass | None]:
        """Context of work of the replayed pass; the model is checked for changes while it runs.

        Cache and generator are restored after an error.

        Args:
            cache: KV cache.
            new: number of tokens that the work may append to the cache.
            generator: random generator that the work draws from.

        Yields:
            The pass; None where the cache is not one for it.

        Raises:
            OutdatedKVError: the cached KV was computed with another state of the model.
            ModelError: an unsupported adapter was added.
        """
        with self._lock:
            # Drafts of ranks differ where their logits do, and a graph knows one buffer a layer.
            single = self.ranks is None and not cache.prefix
            if self._replayed is None or not single or cache.origin != self._origin:
                yield None
                return
            drawn = None if generator is None else generator.get_state()
            try:
                length = cache.length + cache.position_offset + new
                with self._pass_context((cache, length), late=True):
                    yield self._replayed
            except BaseException:
                if generator is not None and drawn is not None:
                    generator.set_state(drawn)
                raise

    @contextmanager
    def _pass_context(self, *planned: tuple[KVCache, int], late: bool = False) -> Iterator[None]:
        """Context of a pass: checks the caches' origins, and restores the caches after an error.

        Autocast is off, because KV outlives the caller's autocast context, and a capture its call.

        Args:
            planned: caches, and the lengths of the whole sequences in tokens.
            late: whether the origins are checked after the pass instead of before it.
        """
        held = [cache.length for cache, _ in planned]
        with self._lock:
            if not late:
                self._require_current(planned, held)
            try:
                with torch.autocast(self.device.type, enabled=False):
                    yield
                if late:
                    self._require_current(planned, held)
            except BaseException:
                for (cache, _), start in zip(planned, held, strict=True):
                    cache.rollback(start)
                raise
            finally:
                if not self._static:
                    self.state.absorb()

    def _require_current(self, planned: Sequence[tuple[KVCache, int]], held: list[int]) -> None:
        """Raise OutdatedKVError if another state of the model has read cached tokens."""
        self._refresh()
        for (cache, length), start in zip(planned, held, strict=True):
            origin = KVOrigin(self.state.number, self._scale(length))
            if start == 0:
                cache.origin = origin
            elif cache.origin not in (None, origin):
                raise OutdatedKVError(
                    f"{self.name} has changed since it read the first "
                    f"{start + cache.position_offset} tokens; read them again with the weights and "
                    "the adapter that it has now"
                )

    def _positions(self, ids: Tensor, cache: KVCache, length: int) -> Tensor:
        """Positions of new tokens, and the sequence's last one if rotary scaling depends on it."""
        first = cache.length + cache.position_offset
        end = first + ids.shape[0]
        own = torch.arange(first, end, device=self.device)
        if self._scale(length) == self._scale(end):
            return own
        return torch.cat([own, own.new_tensor([length - 1])])
