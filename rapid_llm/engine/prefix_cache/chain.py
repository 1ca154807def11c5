"""Digests of the passes of a prefill, by which prompts with a common prefix are found."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from rapid_llm.engine.chunks import pass_ends

TokenIds: TypeAlias = npt.NDArray[np.int32]

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class PassChain:
    """The passes of a prefill, each with a digest of all passes and tokens up to its end.

    Two prefills run the same passes over the same tokens up to an end where their digests there
    are equal. KV is reused up to such an end, see :mod:`rapid_llm.engine.chunks`.

    Attributes:
        ends: end positions of the passes, ascending.
        digests: digest of each pass.
    """

    ends: tuple[int, ...]
    digests: tuple[bytes, ...]

    @classmethod
    def of(cls, tokens: TokenIds, sizes: Sequence[int]) -> PassChain:
        """The passes of a prefill.

        Args:
            tokens: token ids to read, int32 ``[n]``.
            sizes: sizes of passes, descending.
        """
        ends = pass_ends(len(tokens), sizes)
        digests = []
        running, start = blake2b(digest_size=_DIGEST_BYTES), 0
        for end in ends:
            running.update(end.to_bytes(8, "little"))
            running.update(tokens[start:end].tobytes())
            digests.append(running.copy().digest())
            start = end
        return cls(tuple(ends), tuple(digests))

    @property
    def tokens(self) -> int:
        """Number of tokens of all passes."""
        return self.ends[-1] if self.ends else 0

    def up_to(self, tokens: int) -> PassChain:
        """The passes that end at ``tokens`` or before."""
        passes = bisect_right(self.ends, tokens)
        return PassChain(self.ends[:passes], self.digests[:passes])

    def common(self, other: PassChain) -> int:
        """Number of tokens of the first passes that both have."""
        both = range(min(len(self.ends), len(other.ends)))
        # From the first difference on all digests differ.
        passes = bisect_left(both, True, key=lambda i: self.digests[i] != other.digests[i])
        return self.ends[passes - 1] if passes else 0

    @property
    def middle(self) -> bytes:
        """Digest of the first pass that ends in the second half of the tokens."""
        return self.digests[bisect_left(self.ends, (self.tokens + 1) // 2)]
