"""Joined passes as CUDA graphs: one for each bucket of tokens, whatever the sequences share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rapid_llm.engine.cuda.batch import BatchState, is_small
from rapid_llm.engine.cuda.batch_attention import attend_batch, config_of
from rapid_llm.engine.cuda.fused import FusedPass, Layer
from rapid_llm.engine.cuda.graphs import Graphs, Recorder
from rapid_llm.engine.device import device_of
from rapid_llm.engine.parts import Part, kept_tokens

BUCKETS = (16, 32, 64, 128)
"""Numbers of tokens of a captured pass; fewer are filled up."""


class BatchKV:
    """KV of several sequences, whose new tokens fill a bucket.

    Args:
        layer: any layer of the model.
        layers: number of layers.
        bucket: number of tokens of a pass.
        sample: tensor of the model's dtype on its device.
    """

    def __init__(self, layer: Layer, layers: int, bucket: int, sample: Tensor) -> None:
        heads, device = (layer.heads, layer.kv_heads), sample.device
        self._config = config_of(bucket, *heads, layer.dim, sample.dtype, device)
        self.state = BatchState(bucket, layers, self._config.splits, self._config.block, device)
        with torch.inference_mode(False):
            self.tokens = torch.zeros(bucket, dtype=torch.long, device=device)

    def positions(self, n: int) -> Tensor:
        return self.state.tokens[:, 0]

    def attend(self, query: Tensor, index: int, layer: Layer) -> Tensor:
        return attend_batch(
            query, self.state, index, layer.kv_heads, layer.scaling, layer.window, self._config
        )


class JoinedGraphs:
    """Graphs of joined passes.

    Args:
        fused: the pass that is captured.
        record: recorder for graphs of the model.
        device: device of the model.
    """

    def __init__(self, fused: FusedPass, record: Recorder, device: torch.device) -> None:
        self._fused = fused
        self._graphs = Graphs(record, device)
        self._buckets: dict[int, BatchKV] = {}

    def serves(self, parts: Sequence[Part]) -> bool:
        """Whether the tokens and the sequences are few, and the caches are in use."""
        return (
            sum(len(part.ids) for part in parts) <= BUCKETS[-1]
            and is_small(parts)
            and all(part.cache.length > 0 for part in parts)
        )

    def __call__(self, parts: Sequence[Part]) -> list[Tensor]:
        """See :class:`rapid_llm.engine.device.JoinedPass`."""
        for part in parts:
            # It is checked here, because the kernels do not check bounds.
            assert part.cache.length + len(part.ids) <= part.cache.capacity
        ids = torch.cat([part.ids for part in parts])
        kv = self._kv(len(ids))
        kv.state.describe(parts)
        kv.tokens[: len(ids)].copy_(ids)
        logits = self._graphs(kv.state.bucket, partial(self._fused, kv.tokens, kv))
        kept = torch.tensor(kept_tokens(parts), device="cpu")
        kept = device_of(ids.device).upload(kept, ids.device)
        rows = logits.index_select(0, kept)  # a copy, as the next pass overwrites this memory
        for part in parts:
            part.cache.advance(len(part.ids))
        return list(rows.split([part.keep for part in parts]))

    def _kv(self, tokens: int) -> BatchKV:
        """The KV of the smallest bucket for so many tokens, made at its first use."""
        bucket = next(each for each in BUCKETS if each >= tokens)
        if bucket not in self._buckets:
            layers = self._fused.layers
            self._buckets[bucket] = BatchKV(layers[0], len(layers), bucket, self._fused.embedding)
        return self._buckets[bucket]
