"""Forward passes of few tokens as CUDA graphs: one launch instead of hundreds.

A graph is captured for each number of tokens at its first use, and works for all caches of its
model, see :mod:`rapid_llm.engine.cuda.state`. All code but the capture itself runs on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rapid_llm.engine.cuda.fused import FusedPass, HostKV, StateKV
from rapid_llm.engine.cuda.graphs import MAX_TOKENS, Graphs, Recorder
from rapid_llm.engine.cuda.joined import JoinedGraphs
from rapid_llm.engine.cuda.state import describe, size_of
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.parts import Part


class CapturedPasses:
    """Captured passes of a lean model with a fixed rotary embedding, in its current state.

    Args:
        model: the model; weights of its projections become views of fused weights.
        insist: whether a failed capture is an error.

    Attributes:
        fused: the pass that is captured.
        record: recorder for graphs of this model.
        tokens: input buffer for token ids, int64 ``[MAX_TOKENS]`` on the device.
        state: state of the cache, int64 on the device, see :mod:`rapid_llm.engine.cuda.state`.
        kv: the cache of that state.
    """

    def __init__(self, model: Any, insist: bool) -> None:
        self.fused = FusedPass(model)
        device = model.model.embed_tokens.weight.device
        self.record = Recorder(device, insist)
        with torch.inference_mode(False):  # the buffers are written in and outside inference mode
            self.tokens = torch.zeros(MAX_TOKENS, dtype=torch.long, device=device)
            layers = len(model.model.layers)
            self.state = torch.zeros(size_of(layers), dtype=torch.long, device=device)
        self.kv = StateKV(self.state)
        self._graphs = Graphs(self.record, device)
        self._joined = JoinedGraphs(self.fused, self.record, device)

    def serves(self, ids: Tensor, cache: KVCache, keep: int) -> bool:
        """Whether the tokens are few, and the cache is in use."""
        return ids.shape[0] <= MAX_TOKENS and cache.length > 0

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache, keep: int) -> Tensor:
        """See :class:`rapid_llm.engine.device.ReplayedPass`; ``positions`` is ignored."""
        n = ids.shape[0]
        self.begin(ids, cache, n)
        logits = self._graphs(n, partial(self.fused, self.tokens[:n], self.kv))
        logits = logits[-keep:].clone()  # the next pass overwrites this memory
        cache.advance(n)
        return logits

    def joins(self, parts: Sequence[Part]) -> bool:
        """See :class:`rapid_llm.engine.device.JoinedPass`."""
        return self._joined.serves(parts)

    def joined(self, parts: Sequence[Part]) -> list[Tensor]:
        """See :class:`rapid_llm.engine.device.JoinedPass`."""
        return self._joined(parts)

    def read(self, ids: Tensor, cache: KVCache, keep: int) -> Tensor:
        """Run without a graph, kernel by kernel, for any number of tokens and an empty cache."""
        self.fused.allocate(cache)
        self.begin(ids[:0], cache, ids.shape[0])
        with torch.cuda.device_of(self.state):  # Triton launches on the current device
            logits = self.fused(ids, HostKV(self.state, cache), keep)
        cache.advance(ids.shape[0])
        return logits

    def begin(self, ids: Tensor, cache: KVCache, room: int) -> None:
        """Copy token ids and the state of the cache to the device buffers, without waiting.

        Args:
            ids: token ids to read, int64, at most MAX_TOKENS.
            cache: allocated cache.
            room: number of tokens that will be appended. It is checked here, because the kernels do
                not check bounds.
        """
        assert cache.length + room <= cache.capacity
        state = describe(cache)
        if self.state.device.type == "cuda":
            state = state.pin_memory()
        self.state.copy_(state, non_blocking=True)
        if len(ids) > 0:
            self.tokens[: len(ids)].copy_(ids)


class EagerPass:
    """The kernels of captured passes, launched one by one, for prompts and empty caches."""

    def __init__(self, passes: CapturedPasses) -> None:
        self._passes = passes

    def serves(self, ids: Tensor, cache: KVCache, keep: int) -> bool:
        return True

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache, keep: int) -> Tensor:
        return self._passes.read(ids, cache, keep)
