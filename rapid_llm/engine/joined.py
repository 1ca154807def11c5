"""One forward pass over new tokens of several sequences, which reads a common prefix once.

The tokens stand one behind the other, without padding or a batch dimension: linear layers see them
all, and read each weight once. Attention reads each stretch of keys once for all sequences that
have it (a document's for all questions on it), unmasked; each sequence's own keys, with its new
tokens, follow causally. The results are merged by the log-sum-exp of their scores, in float32, as
in FlashDecoding and cascade inference (Ye et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rapid_llm.engine.device import device_of
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.lean import run, window_of
from rapid_llm.engine.parts import Part, kept_tokens, positions_of


class Read(NamedTuple):
    """A stretch of one cache's keys, and the new tokens that attend to it.

    Attributes:
        cache: the cache that holds the keys.
        start, end: the stretch, in its own tokens.
        tokens: the new tokens, by their places in the pass.
        new: number of the stretch's last keys that are those tokens' own; 0 for a stretch that all
            of them see as a whole.
        distance: the largest distance between the position of a token and that of the first key.
    """

    cache: KVCache
    start: int
    end: int
    tokens: slice
    new: int
    distance: int

    @property
    def position(self) -> int:
        """Position of the first key in the sequences."""
        return self.cache.first_position + self.start


def sharing_order(parts: Sequence[Part]) -> list[int]:
    """An order of the parts in which those that read one stretch stand one behind the other.

    Sequences form a tree: what two of them have in common is the beginning of both.

    Args:
        parts: sequences with different caches.

    Returns:
        Indices of the parts.
    """
    ranks: dict[KVCache, int] = {}

    def path(index: int) -> list[tuple[int, int]]:
        cache, ids = parts[index].cache, parts[index].ids
        segments = cache.segments(cache.length + len(ids))
        return [(ranks.setdefault(holder, len(ranks)), end) for holder, end in segments]

    return sorted(range(len(parts)), key=path)


def reads_of(parts: Sequence[Part]) -> list[Read]:
    """The stretches of keys that a joined pass reads, each once.

    Args:
        parts: sequences with different caches, in an order of :func:`sharing_order`.
    """
    places = list(pairwise(accumulate((len(part.ids) for part in parts), initial=0)))
    readers: dict[KVCache, list[tuple[int, int]]] = {}  # (tokens read of it, sequence)
    for index, (ids, cache, _) in enumerate(parts):
        for holder, end in cache.segments(cache.length + len(ids)):
            readers.setdefault(holder, []).append((end, index))
    found = []
    for holder, reading in readers.items():
        start = 0
        for end in sorted({end for end, _ in reading}):
            seen = [index for last, index in reading if last >= end]
            assert seen == list(range(seen[0], seen[-1] + 1)), "the parts are out of order"
            # Only the owner of a cache reads its last stretch, which has the new tokens. Whether
            # it does is not seen by the cache's length, which another thread may set back.
            owner = parts[seen[0]] if parts[seen[0]].cache is holder else None
            new = 0 if owner is None or len(seen) > 1 else len(owner.ids)
            tokens = slice(places[seen[0]][0], places[seen[-1]][1])
            read = Read(holder, start, end, tokens, new, distance=0)
            latest = max(parts[i].position + len(parts[i].ids) for i in seen) - 1
            found.append(read._replace(distance=latest - read.position))
            start = end
    return found


def caches_of(reads: Sequence[Read]) -> dict[KVCache, int]:
    """The caches that a pass reads, in order, and their numbers."""
    caches = dict.fromkeys(read.cache for read in reads)
    return {cache: number for number, cache in enumerate(caches)}


def joined_logits(model: Any, parts: Sequence[Part]) -> list[Tensor]:
    """Run a lean model on new tokens of several sequences, and append their KV to their caches.

    Args:
        model: lean model with a fixed rotary embedding, see :mod:`rapid_llm.engine.lean`.
        parts: sequences with different caches, in an order of :func:`sharing_order`.

    Returns:
        For each part logits ``[keep, vocab]`` in the model's dtype.
    """
    ids = torch.cat([part.ids for part in parts])
    device, lengths = ids.device, [len(part.ids) for part in parts]
    positions = torch.tensor(positions_of(parts), device=device)
    kept = kept_tokens(parts)
    everything = len(kept) == len(ids)
    rows = slice(None) if everything else torch.tensor(kept, device=device)
    reads = reads_of(parts)
    masks: dict[tuple[int, int | None], Tensor | None] = {}

    def mask_of(number: int, window: int | None) -> tuple[Tensor | None, bool]:
        """The mask, and whether it is the causal rule alone."""
        if window is not None and window > reads[number].distance:
            window = None
        if (number, window) not in masks:
            masks[number, window] = _mask(reads[number], positions, window)
        mask = masks[number, window]
        return mask, mask is not None and window is None

    def mix(index: int, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        places = zip(parts, key.split(lengths), value.split(lengths), strict=True)
        for part, keys, values in places:
            part.cache.layers[index].update(
                keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
            )
        n, heads, dim = query.shape
        packed = query.view(n, key.shape[1], -1, dim).permute(1, 2, 0, 3)
        merged = Merged(packed.shape, device)
        kernel = device_of(device).attend_part(query, value)
        for number, read in enumerate(reads):
            layer, stretch = read.cache.layers[index], slice(read.start, read.end)
            own = packed[:, :, read.tokens].reshape(key.shape[1], -1, dim)
            keys, values = layer.keys[0, :, stretch], layer.values[0, :, stretch]
            mask, causal = mask_of(number, window_of(module))
            merged.add(read.tokens, *kernel(own, keys, values, module.scaling, mask, causal))
        return merged.output.to(query.dtype).permute(2, 0, 1, 3).reshape(n, heads, dim)

    logits = run(model, ids, positions, mix, rows)
    return list(logits.split([part.keep for part in parts]))


class Merged:
    """Attention over several stretches of keys, merged by the log-sum-exp of their scores.

    Args:
        shape: ``[kv_heads, group, n, dim]``.
        device: device of the results.

    Attributes:
        output: attention over all stretches so far, float32 ``[kv_heads, group, n, dim]``.
    """

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self.output = torch.zeros(*shape, dtype=torch.float32, device=device)
        self._lse = torch.full(shape[:3], float("-inf"), device=device)

    def add(self, tokens: slice, out: Tensor, lse: Tensor) -> None:
        """Merge the results for one stretch.

        Args:
            tokens: tokens that it is for.
            out: float32 ``[kv_heads, group * tokens, dim]``.
            lse: natural log-sum-exp of each row's scores, float32 ``[kv_heads, group * tokens]``;
                -inf for a row that saw no key.
        """
        kv_heads, group, _, dim = self.output.shape
        lse = lse.view(kv_heads, group, -1)
        before = self._lse[:, :, tokens]
        both = torch.logaddexp(before, lse)
        safe = both.clamp(min=torch.finfo(torch.float32).min)  # not where nothing was seen
        kept = self.output[:, :, tokens] * (before - safe).exp()[..., None]
        new = out.view(kv_heads, group, -1, dim) * (lse - safe).exp()[..., None]
        self.output[:, :, tokens] = kept + new
        self._lse[:, :, tokens] = both


def _mask(read: Read, positions: Tensor, window: int | None) -> Tensor | None:
    """What each token must not see of a stretch's last keys; None if it sees all.

    Args:
        read: the stretch.
        positions: positions of all tokens of the pass, int64 ``[n]``.
        window: size of the sliding window, where it is shorter than the stretch reaches.

    Returns:
        bool ``[tokens, keys]``, for the tokens' own keys only where there is no window.
    """
    if read.new <= 1 and window is None:
        return None
    masked = read.new if window is None else read.end - read.start
    last = read.position + read.end - read.start
    keys = torch.arange(last - masked, last, device=positions.device)
    own = positions[read.tokens][:, None]
    hidden = keys > own
    if window is not None:
        hidden |= keys <= own - window
    return hidden
