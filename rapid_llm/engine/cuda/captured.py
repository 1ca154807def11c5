"""Passes of few tokens as CUDA graphs: one launch instead of some hundreds.

A graph is made for each number of tokens when it is first needed, and serves every cache of its
model: see :mod:`rapid_llm.engine.cuda.state`. Everything but the capture itself runs on any device.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rapid_llm.engine.cuda.fused import FusedPass
from rapid_llm.engine.cuda.graphs import MAX_TOKENS, Graphs, Recorder
from rapid_llm.engine.cuda.state import describe, size_of
from rapid_llm.engine.kv_cache import KVCache


class CapturedPasses:
    """Passes of a lean model with a fixed rotary embedding, as it is now.

    Args:
        model: its projections' weights become views of fused ones.
        insist: whether a capture that fails is an error.

    Attributes:
        fused: the pass that is captured.
        record: makes graphs of it, and of what goes with it.
        tokens: int64 ``[MAX_TOKENS]`` on the device: what it reads.
        state: of the cache that it appends to, see :mod:`rapid_llm.engine.cuda.state`.
    """

    def __init__(self, model: Any, insist: bool) -> None:
        self.fused = FusedPass(model)
        device = model.model.embed_tokens.weight.device
        self.record = Recorder(device, insist)
        with torch.inference_mode(False):  # they are changed in whatever mode the caller is
            self.tokens = torch.zeros(MAX_TOKENS, dtype=torch.long, device=device)
            layers = len(model.model.layers)
            self.state = torch.zeros(size_of(layers), dtype=torch.long, device=device)
        self._graphs = Graphs(self.record, device)

    def serves(self, ids: Tensor, cache: KVCache, keep: int) -> bool:
        """Whether a captured pass can append the tokens: few, to a cache in use."""
        return ids.shape[0] <= MAX_TOKENS and cache.length > 0

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache, keep: int) -> Tensor:
        """See :class:`rapid_llm.engine.device.Pass`; positions follow from the cache."""
        n = ids.shape[0]
        self.begin(ids, cache, n)
        logits = self._graphs(n, partial(self.fused, self.tokens[:n], self.state))
        logits = logits[-keep:].clone()  # the next pass writes to the same place
        cache.advance(n)
        return logits

    def read(self, ids: Tensor, cache: KVCache, keep: int) -> Tensor:
        """The same, launched kernel by kernel: for any number of tokens, and an empty cache."""
        self.fused.allocate(cache)
        self.begin(ids[:0], cache, ids.shape[0])
        with torch.cuda.device_of(self.state):  # Triton launches on the current device
            logits = self.fused(ids, self.state, cache, keep)
        cache.advance(ids.shape[0])
        return logits

    def begin(self, ids: Tensor, cache: KVCache, room: int) -> None:
        """Tell the device what to read and where the cache stands, without waiting for it.

        Args:
            ids: int64, at most MAX_TOKENS.
            cache: allocated.
            room: tokens that will be written to it; kernels would write beyond its end.
        """
        assert cache.length + room <= cache.capacity
        state = describe(cache)
        if self.state.device.type == "cuda":
            state = state.pin_memory()
        self.state.copy_(state, non_blocking=True)
        if len(ids) > 0:
            self.tokens[: len(ids)].copy_(ids)


class EagerPass:
    """The kernels of captured passes, launched one by one: for a prompt, and an empty cache."""

    def __init__(self, passes: CapturedPasses) -> None:
        self._passes = passes

    def serves(self, ids: Tensor, cache: KVCache, keep: int) -> bool:
        return True

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache, keep: int) -> Tensor:
        return self._passes.read(ids, cache, keep)
