"""How many tokens to draft in the next round: as many as the costs and the acceptance so far pay.

The speed model of speculative decoding (Leviathan et al. 2023, arXiv 2211.17192, theorem 3.8, with
a verification that may cost more than a plain step): a round of γ drafted tokens yields

    E(a, γ) = (1 - a^(γ+1)) / (1 - a)    tokens, and costs    γ·c + v(γ)    plain steps.

Everything here follows from the tokens and from costs measured beforehand, never from the clock of
the running generation, so that a generation can be repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # the speed model of the command line uses this module, and needs no torch
    from rapid_llm.engine.costs import PassCost

MAX_GAMMA = 16
"""Longest draft considered: longer ones gain nothing at acceptance rates below 0.95."""

_MEMORY = 0.95  # weight of a round's outcome after the next one: acceptance comes in streaks
_WORTH = 1.05  # the least speedup to draft for: costs are not known better
_RUN = 4  # rounds of drafts that share what the drafter must read before the first of them
_PROBE = 1  # tokens drafted to see whether drafting pays again
_PROBING = 1 / 32  # of the time of plain rounds that probes may take


def expected_tokens(a: float, gamma: int) -> float:
    """E(a, γ), tokens a round yields at acceptance rate a; γ + 1 at a = 1."""
    return sum(a**i for i in range(gamma + 1))


def believed_tokens(accepted: float, tried: float) -> Iterator[float]:
    """E(a, γ) for γ = 1, 2, …, where a is not known but by what was accepted of what was tried.

    The mean over the Beta distribution of a after so many trials, in which the mean of aⁱ is the
    product of (accepted + k) / (tried + k) over k < i. It exceeds E at the mean of a: acceptance
    comes in runs, and the less is known of a, the more a long draft may bring.
    """
    tokens = power = 1.0
    for k in count():
        power *= (accepted + k) / (tried + k)
        tokens += power
        yield tokens


def best_draft(
    tokens: Iterable[float],
    plain: float,
    draft: float,
    verify: Iterable[float],
    *,
    always: bool = False,
) -> tuple[int, float]:
    """The γ that decodes fastest, and its speedup over plain decoding, at least 1 (γ = 0).

    Args:
        tokens: E, what a round is expected to yield, for γ = 1, 2, …; may go on for ever.
        plain: seconds of a plain target step.
        draft: seconds of a draft step; c = draft / plain.
        verify: seconds of a verification pass for γ = 1, 2, …; v = verify / plain.
        always: leave out γ = 0, even if all others are slower.
    """
    best = (0, 0.0) if always else (0, 1.0)
    for gamma, (seconds, expected) in enumerate(zip(verify, tokens, strict=False), start=1):
        speedup = expected * plain / (gamma * draft + seconds)  # E / (γ c + v)
        if speedup > best[1]:
            best = gamma, speedup
    return best


class Prior(NamedTuple):
    """What is thought of a drafter before its first round, as if seen.

    Strong enough to outlast a beginning that goes amiss, as answers in other words do.
    """

    accepted: float
    tried: float


MODEL = Prior(10.0, 12.5)
GUESS = Prior(3.0, 5.0)
"""Of what followed the same n-gram elsewhere."""


class Schedule(Protocol):
    """Decides the draft length of each round.

    ``missed`` is how many tokens were said since the drafter drafted last: it must read them first.
    """

    def speedup(self, lag: int) -> float:
        """Over plain decoding, as expected of the next round."""

    def next(self, lag: int) -> int:
        """γ of the next round; 0 is a plain step."""

    def record(self, drafted: int, accepted: int, passes: int) -> None:
        """Hear how a round went: tokens drafted and accepted, passes of the drafter."""


@dataclass(frozen=True)
class FixedSchedule:
    """The same draft length in every round."""

    gamma: int

    def speedup(self, lag: int) -> float:
        return 1.0  # not known: there is no choice to be made

    def next(self, lag: int) -> int:
        return self.gamma

    def record(self, drafted: int, accepted: int, passes: int) -> None:
        pass


class AdaptiveSchedule:
    """The draft length that maximises expected tokens a second.

    Where drafting does not pay, a token is drafted now and then, to see whether it does again: as
    often as this takes little of the time that plain decoding takes; unless every round must draft.

    Args:
        target: cost of the target's passes at this context length.
        drafter: cost of the drafter's.
        belief: in the drafter, before the first round.
        always: draft at least a token in every round, as what is not drafted gets no transfer.
    """

    def __init__(
        self,
        target: PassCost,
        drafter: PassCost,
        prior: Prior = MODEL,
        *,
        always: bool = False,
    ) -> None:
        self._target, self._drafter, self._always = target, drafter, always
        self._accepted, self._tried = prior
        self._passes, self._drafted = prior.accepted, prior.accepted

    def speedup(self, lag: int) -> float:
        return self._best(lag)[1]

    def _best(self, lag: int) -> tuple[int, float]:
        passes = self._passes / self._drafted  # below 1 where lookup saves some
        # A pass over guesses reads more rows, together one for each token.
        draft = passes * self._drafter.first + (1 - passes) * self._drafter.row
        missing = lag * self._drafter.row / _RUN
        verify = (missing + self._target.seconds(gamma + 1) for gamma in range(1, MAX_GAMMA + 1))
        tokens = believed_tokens(self._accepted, self._tried)
        best = best_draft(tokens, self._target.first, draft, verify, always=self._always)
        return best if self._always or best[1] > _WORTH else (0, 1.0)

    def next(self, lag: int) -> int:
        gamma, _ = self._best(lag)
        if gamma == 0:
            probe = self._drafter.seconds(_PROBE + lag) + _PROBE * self._target.row
            return _PROBE if probe <= _PROBING * lag * self._target.first else 0
        return gamma

    def record(self, drafted: int, accepted: int, passes: int) -> None:
        if drafted == 0:
            return
        tried = accepted + (accepted < drafted)
        self._accepted = _MEMORY * self._accepted + accepted
        self._tried = _MEMORY * self._tried + tried
        self._passes = _MEMORY * self._passes + passes
        self._drafted = _MEMORY * self._drafted + drafted
