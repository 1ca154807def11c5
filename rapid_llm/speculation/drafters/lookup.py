"""Prompt lookup: draft the tokens that followed the same n-gram earlier, without a model.

Prompt lookup (Saxena 2023) and REST (He et al. 2023, arXiv 2311.08252): an answer that quotes its
source repeats runs of tokens, which costs nothing to draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np
import torch
import torch.nn.functional as F

from rapid_llm.engine.costs import PassCost
from rapid_llm.engine.steps import Steps
from rapid_llm.progress import Progress
from rapid_llm.speculation.constraints import Matcher
from rapid_llm.speculation.drafters.base import Draft
from rapid_llm.speculation.schedule import GUESS
from rapid_llm.stats import Origin

SIZES = (4, 3, 2)
"""Lengths of the n-grams that are looked up, the longest first."""

CERTAIN = (4, 3)
"""Lengths whose guesses are accepted often enough to compete with a model's drafts."""

_ROOM = 1024  # free tokens in a new buffer


class NgramIndex:
    """Finds the tokens that followed an n-gram in a growing text.

    Each lookup scans the whole text, which takes microseconds; a table of all n-grams would take
    longer to build than all lookups of an answer.

    Args:
        tokens: token ids of the text.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = np.empty(len(tokens) + _ROOM, dtype=np.int32)
        self._length = 0
        self.extend(tokens)

    def __len__(self) -> int:
        return self._length

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        end = self._length + len(tokens)
        if end > len(self._tokens):
            self._tokens = np.resize(self._tokens, end + _ROOM)
        self._tokens[self._length : end] = tokens
        self._length = end

    def guess(self, tail: Sequence[int], limit: int, sizes: Sequence[int] = SIZES) -> list[int]:
        """Tokens that followed the latest occurrence of the longest known n-gram at a tail.

        Args:
            tail: tokens whose continuation is wanted.
            limit: number of tokens to return; where the text ends sooner, they repeat.
            sizes: lengths of the n-grams to look up, the preferred first.

        Returns:
            ``limit`` tokens, or none if no n-gram was found.
        """
        text = self._tokens[: self._length]
        starts = np.arange(0)  # positions after the occurrences of the current n-gram
        found: dict[int, int] = {}
        for size in range(1, min(max(sizes), len(tail)) + 1):
            token = tail[-size]
            if size == 1:
                starts = np.flatnonzero(text[:-1] == token) + 1
            else:
                starts = starts[starts >= size]
                starts = starts[text[starts - size] == token]
            if len(starts) == 0:
                break
            found[size] = int(starts[-1])
        start = next((found[size] for size in sizes if size in found), None)
        if start is None:
            return []
        rest: list[int] = text[start : start + limit].tolist()
        return list(islice(cycle(rest), limit))


class PromptLookupDrafter:
    """Drafts by lookup alone, at no cost; the q of each token is a point mass.

    Args:
        prompt: token ids of the target's prompt.
        vocab_size: width of the target's logits.
        device: device of the drafts.
        sizes: lengths of the n-grams to look up, the longest first.
        constraint: the grammar of the answer, whose forced tokens come before a guess; None
            without.
    """

    prior = GUESS

    def __init__(
        self,
        prompt: Sequence[int],
        vocab_size: int,
        device: torch.device,
        sizes: Sequence[int] = SIZES,
        constraint: Matcher | None = None,
    ) -> None:
        self._constraint = constraint
        self._prompt = list(prompt)
        self._index = NgramIndex(prompt)
        self._vocab_size = vocab_size
        self._device = device
        self._sizes = sizes

    @property
    def prompt_tokens(self) -> int:
        return 0

    def reading(self, progress: Progress | None) -> Steps[None]:
        yield from ()

    def cost(self) -> PassCost:
        return PassCost(0.0, 0.0)

    def drafting(self, output: Sequence[int], gamma: int, *, look_ahead: bool) -> Steps[Draft]:
        yield from ()  # no pass
        return self.draft(output, gamma, look_ahead=look_ahead)

    def draft(self, output: Sequence[int], gamma: int, *, look_ahead: bool) -> Draft:
        """Propose tokens, see :class:`.base.Drafter`; the draft is empty if nothing was found."""
        assert not look_ahead  # there is no distribution after the last token
        self._index.extend(output[len(self._index) - len(self._prompt) :])
        forced = [] if self._constraint is None else self._constraint.forced((), gamma)
        tail = [*self._prompt[-max(self._sizes) :], *output, *forced]
        guess = self._index.guess(tail, gamma - len(forced), self._sizes)
        if self._constraint is not None:
            guess = [*forced, *self._constraint.legal(forced, guess)]
        tokens = torch.tensor(guess, dtype=torch.long, device=self._device)
        q = F.one_hot(tokens, self._vocab_size).float()
        origins: list[Origin] = ["grammar" for _ in forced]
        origins += ["lookup" for _ in guess[len(forced) :]]
        return Draft(tokens, q, 0, origins)
