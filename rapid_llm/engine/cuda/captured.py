"""Passes of few tokens as CUDA graphs: one launch instead of some hundreds.

A graph is made for each number of tokens when it is first needed, and serves every cache of its
model: see :mod:`rapid_llm.engine.cuda.state`. Everything but the capture itself runs on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rapid_llm.engine.cuda.fused import FusedPass
from rapid_llm.engine.cuda.state import describe, size_of
from rapid_llm.engine.kv_cache import KVCache

MAX_TOKENS = 17
"""In a pass: a draft of 16 tokens and the one before it."""

_WARM_UP = 2  # runs before a capture, in which libraries set up what may not happen in one

Replay = Callable[[], Tensor]


class Capture(Protocol):
    """Turns a function into one that repeats what it launched."""

    def __call__(
        self,
        run: Replay,
        changes: Sequence[Tensor],
        generator: torch.Generator | None,
    ) -> Replay:
        """``changes`` are the tensors that a run alters: each run begins with what they hold."""


class GraphCapture:
    """Records CUDA graphs into one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, run: Replay, changes: Sequence[Tensor], generator: torch.Generator | None
    ) -> Replay:
        before = [tensor.clone() for tensor in changes]
        drawn = None if generator is None else generator.get_state()

        def again() -> None:
            for tensor, value in zip(changes, before, strict=True):
                tensor.copy_(value)

        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        with torch.cuda.device(self._device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    run()
                    again()
                torch.cuda.synchronize()
                # Other threads may go on using the device meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    out = run()
                finally:
                    graph.capture_end()
            here.wait_stream(aside)
        if generator is not None and drawn is not None:
            generator.set_state(drawn)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class CapturedPasses:
    """Passes of a lean and capturable model.

    Args:
        model: lean, with a fixed rotary embedding; its projections' weights become views of fused
            ones.
        capture: records a pass.

    Attributes:
        tokens: int64 ``[MAX_TOKENS]`` on the device: what a pass reads.
        state: of the cache that it appends to, see :mod:`rapid_llm.engine.cuda.state`.
    """

    def __init__(self, model: Any, capture: Capture) -> None:
        self.fused = FusedPass(model)
        self.capture = capture
        device = model.model.embed_tokens.weight.device
        with torch.inference_mode(False):  # they are changed in whatever mode the caller is
            self.tokens = torch.zeros(MAX_TOKENS, dtype=torch.long, device=device)
            layers = len(model.model.layers)
            self.state = torch.zeros(size_of(layers), dtype=torch.long, device=device)
        self._passes: dict[int, Replay] = {}

    def serves(self, ids: Tensor, cache: KVCache) -> bool:
        """Whether a pass can append the tokens: few, to a cache in use that has room."""
        n = ids.shape[0]
        return n <= MAX_TOKENS and 0 < cache.length <= cache.capacity - n

    def __call__(self, ids: Tensor, cache: KVCache, keep: int) -> Tensor:
        """As :func:`rapid_llm.engine.lean.lean_logits`; the positions follow from the cache."""
        n = ids.shape[0]
        self.begin(ids, cache)
        if n not in self._passes:
            tokens = self.tokens[:n]
            self._passes[n] = self.capture(lambda: self.fused(tokens, self.state), [], None)
        logits = self._passes[n]()[-keep:].clone()  # the next pass writes to the same place
        cache.advance(n)
        return logits

    def begin(self, ids: Tensor, cache: KVCache) -> None:
        """Tell the device what to read and where the cache stands, without waiting for it."""
        state = describe(cache)
        if self.state.device.type == "cuda":
            state = state.pin_memory()
        self.state.copy_(state, non_blocking=True)
        self.tokens[: ids.shape[0]].copy_(ids)
