"""New tokens of several sequences, one behind the other, as a joined pass reads them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from rapid_llm.engine.kv_cache import KVCache


class Part(NamedTuple):
    """The new tokens of one sequence in a joined pass.

    Attributes:
        ids: token ids after those in the cache, int64 ``[n]`` on the model's device.
        cache: the sequence's KV cache with room for n more tokens.
        keep: number of last tokens for which logits are computed, 1 to n.
    """

    ids: Tensor
    cache: KVCache
    keep: int

    @property
    def position(self) -> int:
        """Position of the first new token."""
        return self.cache.length + self.cache.position_offset


def positions_of(parts: Sequence[Part]) -> list[int]:
    """Positions of the new tokens of all parts."""
    return [part.position + i for part in parts for i in range(len(part.ids))]


def kept_tokens(parts: Sequence[Part]) -> list[int]:
    """Places in the pass of the tokens for which logits are computed."""
    ends = accumulate(len(part.ids) for part in parts)
    return [at for part, end in zip(parts, ends, strict=True) for at in range(end - part.keep, end)]
