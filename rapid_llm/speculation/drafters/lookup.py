"""Drafting without a model: what followed the last tokens where they stood before.

Prompt lookup (Saxena 2023) and REST (He et al. 2023, arXiv 2311.08252): an answer that quotes
its source repeats runs of tokens, and repeating costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from rapid_llm.engine.costs import PassCost
from rapid_llm.engine.session import PrefillProgress
from rapid_llm.speculation.drafters.base import Draft

SIZES = (4, 3, 2)
"""Lengths of the n-grams that are looked up, the longest first."""

CERTAIN = (4, 3)
"""Those that are right often enough to compete with a model's drafts."""


class NgramIndex:
    """Where every n-gram of a growing text was last continued.

    Args:
        tokens: the text that continuations are taken from.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; n-grams are found from the moment that a token follows them."""
        for token in tokens:
            end = len(self._tokens)
            for size in SIZES:
                if end >= size:
                    self._next[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def guess(self, tail: Sequence[int], limit: int, sizes: Sequence[int] = SIZES) -> list[int]:
        """At most ``limit`` tokens that followed the longest n-gram that ``tail`` ends with."""
        for size in sizes:
            start = self._next.get(tuple(tail[-size:]))
            if start is not None:
                return self._tokens[start : start + limit]
        return []


class LookupDrafter:
    """Drafts by lookup alone; each token's q is a point mass. No model, so no cost.

    Args:
        prompt: the target's.
        vocab_size: width of the target's logits.
        device: where the draft is wanted.
        sizes: of the n-grams, the longest first.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        vocab_size: int,
        device: torch.device,
        sizes: Sequence[int] = SIZES,
    ) -> None:
        self._prompt = list(prompt)
        self._index = NgramIndex(())  # filled when it is first needed
        self._vocab_size = vocab_size
        self._device = device
        self._sizes = sizes

    @property
    def prompt_tokens(self) -> int:
        return 0

    def prefill(self, progress: PrefillProgress | None) -> None:
        pass

    def cost(self) -> PassCost:
        return PassCost(0.0, 0.0)

    def draft(self, output: Sequence[int], gamma: int, *, look_ahead: bool) -> Draft:
        """See :class:`Drafter`; an empty draft where nothing was found."""
        assert not look_ahead  # there is no distribution after the last token
        sequence = [*self._prompt, *output]
        self._index.extend(sequence[len(self._index) :])
        guess = self._index.guess(sequence, gamma, self._sizes)
        tokens = torch.tensor(guess, dtype=torch.long, device=self._device)
        return Draft(tokens, F.one_hot(tokens, self._vocab_size).float(), passes=0)
