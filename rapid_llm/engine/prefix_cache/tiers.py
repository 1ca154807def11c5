"""One tier of kept KV: prefixes within a budget in bytes, evicted least recently used first."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

from rapid_llm.engine.kv_cache import KVOrigin
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache.chain import PassChain
from rapid_llm.engine.prefix_cache.index import PrefixIndex
from rapid_llm.engine.rounding import rounding

Tier = Literal["device", "host", "disk"]
"""Where kept KV lies, the nearest first."""


class ReaderState(NamedTuple):
    """Everything that a model's KV depends on except the tokens and the passes.

    Attributes:
        runner: the model.
        origin: state of the model; None where its KV must not be kept.
        rounding: description of the rounding of its passes.
    """

    runner: ModelRunner
    origin: KVOrigin | None
    rounding: str

    @classmethod
    def now(cls, runner: ModelRunner, length: int) -> ReaderState:
        """The current state, for a sequence of ``length`` tokens."""
        return cls(runner, runner.kept_origin(length), rounding(runner))


class Prefix(Protocol):
    """KV of the first passes of a prefill.

    Attributes:
        state: the model that read it.
        chain: the passes, at least one.
        nbytes: its size in bytes.
    """

    @property
    def state(self) -> ReaderState: ...

    @property
    def chain(self) -> PassChain: ...

    @property
    def nbytes(self) -> int: ...

    def __hash__(self) -> int: ...


P = TypeVar("P", bound=Prefix)


class PrefixTier(Generic[P]):
    """Prefixes within a budget; not safe to use from several threads at once.

    Args:
        budget: maximum number of bytes.

    Attributes:
        budget: maximum number of bytes.
        nbytes: bytes of all prefixes, at most the budget.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self._prefixes: dict[P, None] = {}  # the least recently used first
        self._index: PrefixIndex[P] = PrefixIndex()

    def __iter__(self) -> Iterator[P]:
        """The prefixes at this moment, the least recently used first."""
        return iter(list(self._prefixes))

    def __contains__(self, prefix: P) -> bool:
        return prefix in self._prefixes

    def longest(self, state: Hashable, chain: PassChain) -> tuple[P | None, int]:
        """The prefix that shares the most tokens with a prefill, and their number."""
        return self._index.longest(state, chain)

    def add(self, prefix: P) -> list[P]:
        """Add a prefix that fits into the budget, in place of others on the same document.

        Returns:
            Prefixes evicted to make room.
        """
        assert prefix.nbytes <= self.budget
        for other in self._index.mostly_in(prefix.state, prefix.chain):
            self.discard(other)
        left = self.make_room(prefix.nbytes)
        self._prefixes[prefix] = None
        self._index.add(prefix, prefix.state, prefix.chain)
        self.nbytes += prefix.nbytes
        return left

    def make_room(self, nbytes: int) -> list[P]:
        """Remove the least recently used until ``nbytes`` more fit, and return them.

        Nothing is removed for what exceeds the budget, because it will not be kept.
        """
        left: list[P] = []
        if nbytes <= self.budget:
            for prefix in self:
                if self.nbytes + nbytes <= self.budget:
                    break
                self.discard(prefix)
                left.append(prefix)
        return left

    def use(self, prefix: P) -> None:
        """Make a prefix the most recently used, if it is still here."""
        if prefix in self._prefixes:
            del self._prefixes[prefix]
            self._prefixes[prefix] = None

    def discard(self, prefix: P) -> None:
        """Remove a prefix, if it is here."""
        if prefix in self._prefixes:
            del self._prefixes[prefix]
            self._index.discard(prefix)
            self.nbytes -= prefix.nbytes
