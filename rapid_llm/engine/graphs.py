"""The single-token step as a CUDA graph: one launch instead of a few hundred.

A graph repeats fixed work on fixed addresses. So a step reads its token and its place from tensors,
writes its key and value to where these say, and attends over the cache's whole buffers, in which
what is not filled yet is hidden. Everything but the capture itself runs on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rapid_llm.engine.kv_cache import KVCache, PreallocatedLayer
from rapid_llm.engine.lean import lean_logits

_WARM_UP = 3  # runs before a capture, in which libraries set up what may not happen in one
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # the others ask the device for a length


def is_capturable(model: Any) -> bool:
    """Whether the single-token step of a lean model never waits for the device."""
    return getattr(model.model.rotary_emb, "rope_type", None) in _FIXED_ROPE


def capture(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Record what a function launches on a CUDA device; what returns replays it."""
    with torch.cuda.device(device):
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                step()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class _FixedCache:
    """What the lean forward pass needs of a cache, for a token whose slot is in ``place``."""

    def __init__(self, cache: KVCache, place: Tensor) -> None:
        self.place = place
        self.layers = [_FixedLayer(layer, self) for layer in cache.layers]
        self._hidden: dict[int | None, Tensor] = {}

    def begin(self) -> None:
        """Forget the masks of the step before."""
        self._hidden.clear()

    def hidden(self, window: int | None) -> Tensor:
        """Bool ``[1, capacity]``, one for all layers of a window."""
        if window not in self._hidden:
            slots = torch.arange(self.layers[0].keys.shape[2], device=self.place.device)
            hidden = slots > self.place
            if window is not None:
                hidden |= slots <= self.place - window
            self._hidden[window] = hidden[None]
        return self._hidden[window]


class _FixedLayer:
    """The whole buffers of one layer."""

    def __init__(self, layer: PreallocatedLayer, cache: _FixedCache) -> None:
        self.layer = layer
        self.keys, self.values = layer.keys, layer.values
        self.last_query: Tensor | None = None
        self._cache = cache
        for buffer in (self.keys, self.values):
            # A hidden value counts 0 times, which is 0 only if it is a number.
            buffer[:, :, layer.length :] = 0

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self._cache.place, key)
        self.values.index_copy_(2, self._cache.place, value)
        return self.keys, self.values

    def hidden(self, window: int | None) -> Tensor:
        return self._cache.hidden(window)


class GraphedStep:
    """One-token steps over one cache.

    Args:
        model: lean and capturable.
        cache: allocated, with room for another token. The step serves it until it grows.
        capture: records a step; see :func:`capture`.
    """

    def __init__(
        self,
        model: Any,
        cache: KVCache,
        capture: Callable[[Callable[[], Tensor], torch.device], Callable[[], Tensor]] = capture,
    ) -> None:
        device = cache.layers[0].keys.device
        self._token = torch.zeros(1, dtype=torch.long, device=device)
        self._place = torch.full((1,), cache.length, device=device)
        self._skipped = torch.full((1,), cache.skipped, device=device)
        self._fixed = _FixedCache(cache, self._place)

        def step() -> Tensor:
            self._fixed.begin()
            position = self._place + self._skipped
            return lean_logits(model, self._token, position, self._fixed, keep_logits=1)

        self._replay = capture(step, device)

    def serves(self, cache: KVCache) -> bool:
        """Whether the cache's buffers are those of the graph."""
        return all(
            fixed.keys is layer.keys
            for fixed, layer in zip(self._fixed.layers, cache.layers, strict=True)
        )

    def __call__(self, token: Tensor, cache: KVCache) -> Tensor:
        """Append int64 ``[1]``; float32 logits ``[1, vocab]`` of its own memory."""
        self._token.copy_(token)
        self._place.fill_(cache.length)
        self._skipped.fill_(cache.skipped)
        logits = self._replay().to(torch.float32, copy=True)
        for fixed in self._fixed.layers:
            fixed.layer.length += 1
            fixed.layer.last_query = fixed.last_query
        return logits
