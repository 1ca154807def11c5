"""Passages joined to a context of a given length, as the benchmarks make short texts long."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from random import Random

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.encoding import encode_literal
from rapid_llm.errors import DataError, InvalidParameterError

BETWEEN = "\n\n"
DEPTHS = ("0–20 %", "20–40 %", "40–60 %", "60–80 %", "80–100 %")


@dataclass(frozen=True)
class Filled:
    """The passages of a context in order, and where in it those are that had to be there."""

    texts: list[str]
    places: list[int]

    @property
    def depth(self) -> str:
        """The fifth of the context in which the first of those begins."""
        return depth_group(sum(map(len, self.texts[: self.places[0]])) / sum(map(len, self.texts)))


class Passages:
    """The passages of a file, to fill contexts with.

    Args:
        source: what an error calls the file.
        texts: the passages.
        tokenizer: the target's fast tokenizer.
    """

    def __init__(
        self, source: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._source = source
        self._texts = texts
        self._tokenizer = tokenizer
        self._tokens = [self._length(text) for text in texts]

    def fill(
        self, kept: Sequence[str], tokens: int, rng: Random, banned: AbstractSet[int]
    ) -> Filled:
        """Whole passages, drawn at random, around texts that the context holds in any case.

        Args:
            kept: those texts; they come in this order, at random places.
            tokens: of the whole context, which is at most about so long.
            rng: of the item.
            banned: indices of passages that must not be drawn.

        Raises:
            InvalidParameterError: the kept texts are longer than ``tokens``.
            DataError: all that may be drawn is shorter than ``tokens``.
        """
        room = tokens - sum(map(self._length, kept))
        if room < 0:
            raise InvalidParameterError(
                f"context_tokens={tokens} is too short for {tokens - room} tokens of "
                f"{self._source} that have to be in the context: give at least {tokens - room}"
            )
        others = [i for i in range(len(self._texts)) if i not in banned]
        rng.shuffle(others)
        texts = []
        for i in others:
            if self._tokens[i] <= room:
                room -= self._tokens[i]
                texts.append(self._texts[i])
        if room > 0 and len(texts) == len(others):
            raise DataError(
                f"{self._source} holds passages for a context of {tokens - room} tokens, not of "
                f"context_tokens={tokens}: lower it, or give a larger file with --data PATH"
            )
        gaps = sorted(rng.randint(0, len(texts)) for _ in kept)
        places = [gap + before for before, gap in enumerate(gaps)]
        for place, text in zip(places, kept, strict=True):
            texts.insert(place, text)
        return Filled(texts, places)

    def _length(self, text: str) -> int:
        return len(encode_literal(BETWEEN + text, self._tokenizer))


def depth_group(depth: float) -> str:
    """The fifth of a context in which a depth from 0 (its beginning) to 1 lies."""
    return DEPTHS[min(int(depth * len(DEPTHS)), len(DEPTHS) - 1)]
