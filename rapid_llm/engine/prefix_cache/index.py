"""Index of kept prefixes: find the longest one that a prompt shares, without comparing prompts."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable
from typing import Generic, TypeVar

from rapid_llm.engine.prefix_cache.chain import PassChain

T = TypeVar("T", bound=Hashable)


class PrefixIndex(Generic[T]):
    """Finds items by the passes of their prefills; the cost does not grow with their number.

    An item is found by prefills in the same state only: a hashable value for everything but tokens
    and passes on which KV depends.
    """

    def __init__(self) -> None:
        self._items: dict[T, tuple[Hashable, PassChain]] = {}
        # By state and digest of a pass; the latest item is the last.
        self._passes: dict[Hashable, dict[bytes, list[T]]] = defaultdict(dict)
        self._middles: dict[Hashable, dict[bytes, list[T]]] = defaultdict(dict)

    def __contains__(self, item: T) -> bool:
        return item in self._items

    def add(self, item: T, state: Hashable, chain: PassChain) -> None:
        """Add an item with the passes of its prefill, at least one."""
        self._items[item] = state, chain
        for digest in chain.digests:
            self._passes[state].setdefault(digest, []).append(item)
        self._middles[state].setdefault(chain.middle, []).append(item)

    def discard(self, item: T) -> None:
        """Remove an item, if it is there."""
        if item not in self._items:
            return
        state, chain = self._items.pop(item)
        _discard(self._passes, state, chain.digests, item)
        _discard(self._middles, state, (chain.middle,), item)

    def longest(self, state: Hashable, chain: PassChain) -> tuple[T | None, int]:
        """The item that shares the most passes with a prefill, the latest of equals.

        Returns:
            The item and the number of tokens of the shared passes; None and 0 if there is none.
        """
        here = self._passes.get(state, {})
        # An item is listed under all its passes, so that the shared ones come first.
        passes = bisect_left(
            range(len(chain.ends)), True, key=lambda i: chain.digests[i] not in here
        )
        if passes == 0:
            return None, 0
        return here[chain.digests[passes - 1]][-1], chain.ends[passes - 1]

    def mostly_in(self, state: Hashable, chain: PassChain) -> list[T]:
        """Items that share at least half of their tokens with a prefill."""
        here = self._middles.get(state, {})
        return [item for digest in chain.digests for item in here.get(digest, ())]

    def covered(self, state: Hashable, chain: PassChain, share: float) -> list[T]:
        """Items that share at least so much of their tokens, from a half up, with a prefill."""
        return [
            item
            for item in self.mostly_in(state, chain)
            if (own := self._items[item][1]).common(chain) >= share * own.tokens
        ]


def _discard(
    where: dict[Hashable, dict[bytes, list[T]]],
    state: Hashable,
    digests: tuple[bytes, ...],
    item: T,
) -> None:
    here = where[state]
    for digest in digests:
        here[digest].remove(item)
        if not here[digest]:
            del here[digest]
    if not here:
        del where[state]
