"""Caches in use: leased for one prompt each, and shared with prompts that begin the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache.chain import PassChain, TokenIds
from rapid_llm.engine.prefix_cache.tiers import ReaderState, Tier


@dataclass(frozen=True)
class Lease:
    """A cache in use for one prompt.

    Attributes:
        cache: KV cache with the prompt's first ``reused`` tokens and the requested capacity. The
            rest of ``prompt[:-1]`` is read into it by :meth:`Session.prefill`. Of these tokens only
            the last may be changed later, because another lease may be copying them.
        origins: number of reused tokens by the tier that they come from.
    """

    cache: KVCache
    origins: Mapping[Tier, int]

    @property
    def reused(self) -> int:
        """Number of tokens that need not be read, at most ``len(prompt) - 1``, because the last
        token must be read for its logits."""
        return sum(self.origins.values())

    def shortened(self, tokens: int) -> Lease:
        """The lease with at most its first ``tokens`` reused; the cache is rolled back to them."""
        self.cache.rollback(tokens)
        origins: dict[Tier, int] = {}
        for tier, count in self.origins.items():
            origins[tier] = min(count, tokens - sum(origins.values()))
        return Lease(self.cache, origins)


@dataclass(eq=False)
class Reading:
    """A leased cache, and the prefill that fills it.

    Attributes:
        runner: model that computes the KV.
        rounding: description of the rounding of its passes.
        cache: KV cache.
        tokens: tokens of the prefill.
        chain: passes of the prefill.
        kept: number of first tokens whose KV the prefill's own passes have computed; None for all.
            What follows a borrowed document is read by joined passes, which round differently.
    """

    runner: ModelRunner
    rounding: str
    cache: KVCache
    tokens: TokenIds
    chain: PassChain
    kept: int | None = None

    @property
    def state(self) -> ReaderState:
        """State of the model that computed the cache's current contents."""
        return ReaderState(self.runner, self.cache.origin, self.rounding)

    @property
    def held(self) -> int:
        """Number of the prefill's tokens that were read."""
        return min(len(self.tokens), self.cache.length)

    @property
    def exact(self) -> int:
        """Number of the prefill's tokens that its own passes have read."""
        return self.held if self.kept is None else min(self.held, self.kept)

    def shared(self, state: ReaderState, other: Prefill) -> int:
        """Number of its first tokens whose KV another prefill can reuse now, bit for bit.

        Args:
            state: state of the other prefill's model.
            other: the other prefill.
        """
        return self.chain.up_to(min(self._settled(state), self.exact)).common(other.chain)

    def lendable(self, state: ReaderState, other: Prefill) -> int:
        """The same for joined passes, whose KV is not kept and may be rounded otherwise."""
        return min(self._settled(state), self.will_lend(state.runner, other))

    def will_lend(self, runner: ModelRunner, other: Prefill) -> int:
        """Number of its first tokens that joined passes can reuse once it has read them."""
        if runner is not self.runner:
            return 0
        # A drafter may read the last token of the prefill again.
        most = max(0, min(len(self.tokens), len(other.tokens)) - 1)
        differing = np.flatnonzero(self.tokens[:most] != other.tokens[:most])
        return int(differing[0]) if len(differing) else most

    def _settled(self, state: ReaderState) -> int:
        """Number of its first tokens that were read and do not change."""
        if self.cache.origin is None or self.state != state:
            return 0
        # A drafter may read the last token of the prefill again.
        return max(0, min(self.held, len(self.tokens) - 1))


class Prefill(NamedTuple):
    """What is read of a prompt before its first answer token: all but its last token.

    Attributes:
        tokens: token ids, int32 ``[n]``.
        chain: the passes over them.
    """

    tokens: TokenIds
    chain: PassChain


def prefill_of(runner: ModelRunner, prompt: Sequence[int]) -> Prefill:
    """The prefill of a prompt by a model."""
    tokens = np.asarray(prompt[:-1], dtype=np.int32)
    return Prefill(tokens, PassChain.of(tokens, runner.prefill_sizes))
