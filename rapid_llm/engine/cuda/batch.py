"""State of a joined pass for kernels: an int64 tensor on the device, read by a captured graph.

As in :mod:`rapid_llm.engine.cuda.state`, all that changes from pass to pass is data: positions, the
addresses of the sequences' buffers, and the pieces into which the reading of keys is divided. So
one graph for each bucket of tokens serves any number of sequences, whatever they share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rapid_llm.engine.joined import caches_of, reads_of
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.parts import Part, positions_of

MOST_SEQUENCES = 16
"""Maximum number of sequences in a pass."""

MOST_CACHES = 64
"""Maximum number of caches of all sequences, those counted again that several have in common; also
the maximum number of stretches of keys."""

MOST_STRETCHES = 2 * MOST_SEQUENCES
"""Maximum number of stretches of keys that a token attends to."""

TOKEN = 3
"""Numbers of a token: its position, its cache (-1 for a token that only fills the bucket), and its
place there."""

CACHE = 2
"""Numbers of a cache before its addresses: its capacity, and the position of its first key. The
addresses of each layer's keys and values follow."""

PIECE = 6
"""Numbers of a piece: its cache, its first key there, its number of keys, the first of the tokens
that attend to it, their number, and the number of tokens of all pieces before it."""


def is_small(parts: Sequence[Part]) -> bool:
    """Whether a state has room for the sequences, and for all that they borrow.

    The stretches that a token attends to end where a cache of its own sequence does, or where
    another sequence leaves it, which each does once.
    """
    borrowed = [len(part.cache.prefix) for part in parts]
    return (
        len(parts) <= MOST_SEQUENCES
        and len(parts) + sum(borrowed) <= MOST_CACHES
        and len(parts) + max(borrowed) <= MOST_STRETCHES
    )


class BatchState:
    """State of joined passes of one bucket.

    Args:
        bucket: number of tokens of a pass, those included that only fill it.
        layers: number of layers.
        splits: number of pieces into which the keys of one sequence would be divided.
        block: number of keys in a step of the kernel; pieces are multiples of it.
        device: device of the tensors.

    Attributes:
        tokens: int64 ``[bucket, TOKEN]``.
        caches: int64 ``[MOST_CACHES, CACHE + 2 * layers]``.
        pieces: int64 ``[most pieces, PIECE]``; those without keys are unused.
        rows: maximum number of tokens of all pieces.
    """

    def __init__(
        self, bucket: int, layers: int, splits: int, block: int, device: torch.device
    ) -> None:
        self.bucket, self._splits, self._block = bucket, splits, block
        # A stretch has at most a piece more than its share of the splits.
        self.rows = (splits + MOST_STRETCHES) * bucket
        shapes = (bucket, TOKEN), (MOST_CACHES, CACHE + 2 * layers), (splits + MOST_CACHES, PIECE)
        self._sizes = [rows * columns for rows, columns in shapes]
        with torch.inference_mode(False):  # written in and outside inference mode
            self._all = torch.zeros(sum(self._sizes), dtype=torch.long, device=device)
            views = zip(self._all.split(self._sizes), shapes, strict=True)
            self.tokens, self.caches, self.pieces = (view.view(shape) for view, shape in views)

    def describe(self, parts: Sequence[Part]) -> None:
        """Copy the state of a pass to the device, without waiting.

        Args:
            parts: those of :func:`is_small`, with allocated caches, in an order of
                :func:`.joined.sharing_order`.
        """
        reads = reads_of(parts)
        number = caches_of(reads)
        tokens = [
            (position, number[part.cache], position - part.cache.first_position)
            for part in parts
            for position in positions_of([part])
        ]
        keys = sum(read.end - read.start for read in reads)
        size = -(-keys // self._splits // self._block) * self._block
        pieces, rows = [], 0
        for read in reads:
            readers = read.tokens.stop - read.tokens.start
            for start in range(read.start, read.end, size):
                count = min(size, read.end - start)
                pieces.append((number[read.cache], start, count, read.tokens.start, readers, rows))
                rows += readers
        assert rows <= self.rows  # the kernels do not check it
        tokens += [(0, -1, 0)] * (self.bucket - len(tokens))
        described = [_described(cache) for cache in number]
        host = torch.zeros(sum(self._sizes), dtype=torch.long, device="cpu")
        for view, numbers in zip(host.split(self._sizes), (tokens, described, pieces), strict=True):
            flat = torch.tensor(numbers, dtype=torch.long, device="cpu").flatten()
            view[: len(flat)] = flat
        if self._all.device.type == "cuda":
            host = host.pin_memory()
        self._all.copy_(host, non_blocking=True)


def _described(cache: KVCache) -> list[int]:
    buffers = [t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)]
    return [cache.capacity - cache.prefix_length, cache.first_position, *buffers]
