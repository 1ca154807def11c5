"""What a drafter is to the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rapid_llm.engine.costs import PassCost
from rapid_llm.engine.session import PrefillProgress
from rapid_llm.speculation.schedule import Prior


@dataclass(frozen=True)
class Draft:
    """A proposal.

    Attributes:
        tokens: int64 ``[γ]``.
        probabilities: float32 ``[γ, vocab]``, row i is the distribution q that token i was drawn
            from; ``[γ+1, vocab]`` if the one after the draft was asked for.
        passes: forward passes of the drafter.
    """

    tokens: Tensor
    probabilities: Tensor
    passes: int


class Drafter(Protocol):
    """Proposes tokens that continue the output so far."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the drafter's own prompt; 0 if it has none."""

    def prefill(self, progress: PrefillProgress | None) -> None:
        """Read the prompt, once, before the first draft."""

    @property
    def prior(self) -> Prior:
        """How many of its tokens will be accepted, as far as one knows beforehand."""

    def cost(self) -> PassCost:
        """Seconds of a pass, to be asked for after the prefill."""

    def draft(self, output: Sequence[int], gamma: int, *, look_ahead: bool) -> Draft:
        """Draw at most γ tokens after ``output`` (which may drop tokens of an earlier draft).

        ``look_ahead`` asks for the distribution after the last drafted token too.
        """
