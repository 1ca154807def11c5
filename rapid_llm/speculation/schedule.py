"""Draft length of each round, chosen for speed from measured costs and the acceptance so far.

The speed model of speculative decoding (Leviathan et al. 2023, arXiv 2211.17192, theorem 3.8, with
a verification that may cost more than a plain step): a round of γ drafted tokens yields

    E(a, γ) = (1 - a^(γ+1)) / (1 - a)    tokens, and costs    γ·c + v(γ)    plain steps.

The choice depends only on the tokens and on costs measured beforehand, never on the clock of the
running generation, so that a generation is repeatable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # the speed model of the command line uses this module without torch
    from rapid_llm.engine.costs import PassCost

MAX_GAMMA = 16
"""Longest draft considered: longer ones gain nothing at acceptance rates below 0.95."""

_DECAY = 0.95  # factor per round on the weight of past outcomes: acceptance comes in streaks
_MIN_SPEEDUP = 1.05  # minimum expected speedup to draft for: costs are not known more precisely
_RUN = 4  # rounds over which the cost of reading the lag is spread
_PROBE = 1  # tokens drafted to test whether drafting pays again
_PROBE_TIME = 1 / 32  # maximum time of probes, as a share of the time of plain rounds


def expected_tokens(a: float, gamma: int) -> float:
    """E(a, γ), expected tokens of a round at acceptance rate a; γ + 1 at a = 1."""
    return sum(a**i for i in range(gamma + 1))


def believed_tokens(accepted: float, tried: float) -> Iterator[float]:
    """Expected tokens of a round for γ = 1, 2, …, with a estimated from past trials.

    The mean of E(a, γ) over the Beta distribution of a after ``accepted`` of ``tried`` tokens were
    accepted, in which the mean of aⁱ is the product of (accepted + k) / (tried + k) over k < i. It
    exceeds E at the mean of a: the less is known about a, the more a long draft may yield.
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
    """The fastest draft length γ, and its speedup over plain decoding.

    Args:
        tokens: expected tokens of a round (E) for γ = 1, 2, …; may be infinite.
        plain: seconds of a plain target step.
        draft: seconds of a draft step; c = draft / plain.
        verify: seconds of a verification pass for γ = 1, 2, …; v = verify / plain.
        always: whether γ = 0 is excluded, even if all others are slower.

    Returns:
        γ and the speedup; 0 and 1.0 where plain decoding is fastest.
    """
    best = (0, 0.0) if always else (0, 1.0)
    for gamma, (seconds, expected) in enumerate(zip(verify, tokens, strict=False), start=1):
        speedup = expected * plain / (gamma * draft + seconds)  # E / (γ c + v)
        if speedup > best[1]:
            best = gamma, speedup
    return best


class Prior(NamedTuple):
    """Prior belief about a drafter's acceptance, as counts of tokens before the first round.

    The counts are large enough to outweigh a few rejections at the beginning of an answer.
    """

    accepted: float
    tried: float


MODEL = Prior(10.0, 12.5)
"""Prior for drafts of a model."""

GUESS = Prior(3.0, 5.0)
"""Prior for prompt lookup: tokens that followed the same n-gram elsewhere."""


class Schedule(Protocol):
    """Chooses the draft length of each round.

    ``lag`` is the number of tokens since the drafter's last draft, which it must read first.

    Attributes:
        sequences: number of sequences whose passes are joined in the next round.
    """

    sequences: int

    def speedup(self, lag: int) -> float:
        """Expected speedup of the next round over plain decoding."""

    def next(self, lag: int) -> int:
        """γ of the next round; 0 is a plain step."""

    def record(self, drafted: int, accepted: int, passes: int) -> None:
        """Record a round: tokens drafted and accepted, and passes of the drafter."""


@dataclass
class FixedSchedule:
    """The same draft length in every round."""

    gamma: int
    sequences: int = 1

    def speedup(self, lag: int) -> float:
        return 1.0  # unknown, and not needed: there is nothing to choose

    def next(self, lag: int) -> int:
        return self.gamma

    def record(self, drafted: int, accepted: int, passes: int) -> None:
        pass


class AdaptiveSchedule:
    """The draft length that maximises expected tokens per second.

    Where drafting does not pay, it probes now and then whether it pays again: one token is drafted,
    as often as probes take little of the time of plain decoding.

    Args:
        target: cost of the target's passes at this context length.
        drafter: cost of the drafter's passes.
        prior: belief about the drafter's acceptance before the first round.
        always: whether every round drafts at least one token, because tokens that are not drafted
            get no knowledge transfer.
    """

    def __init__(
        self,
        target: PassCost,
        drafter: PassCost,
        prior: Prior = MODEL,
        *,
        always: bool = False,
    ) -> None:
        self.sequences = 1
        self._alone, self._always = (target, drafter), always
        self._accepted, self._tried = prior
        self._passes, self._drafted = prior.accepted, prior.accepted

    @property
    def _target(self) -> PassCost:
        return self._alone[0].together(self.sequences)

    @property
    def _drafter(self) -> PassCost:
        return self._alone[1].together(self.sequences)

    def speedup(self, lag: int) -> float:
        return self._best(lag)[1]

    def _best(self, lag: int) -> tuple[int, float]:
        passes = self._passes / self._drafted  # per drafted token; below 1 where lookup saves some
        drafter = self._drafter
        # Passes that verify guesses read more rows, in total one per token.
        draft = passes * drafter.first + (1 - passes) * drafter.row
        missing = lag * drafter.row / _RUN
        target = self._target
        verify = (missing + target.seconds(gamma + 1) for gamma in range(1, MAX_GAMMA + 1))
        tokens = believed_tokens(self._accepted, self._tried)
        best = best_draft(tokens, target.first, draft, verify, always=self._always)
        return best if self._always or best[1] > _MIN_SPEEDUP else (0, 1.0)

    def next(self, lag: int) -> int:
        gamma, _ = self._best(lag)
        if gamma == 0:
            probe = self._drafter.seconds(_PROBE + lag) + _PROBE * self._target.row
            return _PROBE if probe <= _PROBE_TIME * lag * self._target.first else 0
        return gamma

    def record(self, drafted: int, accepted: int, passes: int) -> None:
        if drafted == 0:
            return
        tried = accepted + (accepted < drafted)
        self._accepted = _DECAY * self._accepted + accepted
        self._tried = _DECAY * self._tried + tried
        self._passes = _DECAY * self._passes + passes
        self._drafted = _DECAY * self._drafted + drafted
