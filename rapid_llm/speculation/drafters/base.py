"""The ``Drafter`` protocol, and the draft that a drafter returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rapid_llm.engine.costs import PassCost
from rapid_llm.engine.steps import Steps
from rapid_llm.progress import Progress
from rapid_llm.speculation.schedule import Prior
from rapid_llm.stats import Origin


@dataclass(frozen=True)
class Draft:
    """Proposed tokens and their probabilities.

    Attributes:
        tokens: proposed tokens, int64 ``[γ]``.
        probabilities: float32 ``[γ, vocab]``; row i is the distribution q that token i was drawn
            from. ``[γ+1, vocab]`` with ``look_ahead``.
        passes: number of forward passes of the drafter.
        origins: where each token came from; empty where all are the drafter's.
    """

    tokens: Tensor
    probabilities: Tensor
    passes: int
    origins: Sequence[Origin] = ()


class Drafter(Protocol):
    """Proposes tokens that continue the output so far."""

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens in the drafter's prompt; 0 if it has none."""

    def reading(self, progress: Progress | None) -> Steps[None]:
        """Read the prompt, once, before the first draft."""

    @property
    def prior(self) -> Prior:
        """Prior belief about the acceptance of its tokens."""

    def cost(self) -> PassCost:
        """Cost of a forward pass in seconds; called after the prefill."""

    def drafting(self, output: Sequence[int], gamma: int, *, look_ahead: bool) -> Steps[Draft]:
        """Propose tokens after the output so far.

        Args:
            output: all tokens of the answer; tokens of earlier drafts may be missing from it.
            gamma: maximum number of tokens to propose.
            look_ahead: whether to return the distribution after the last drafted token too.
        """
