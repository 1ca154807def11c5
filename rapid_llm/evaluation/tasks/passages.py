"""Join passages to a context of a given length."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from random import Random

from rapid_llm.context.retrieved import SEPARATOR
from rapid_llm.encoding import encode_literal
from rapid_llm.errors import DataError, InvalidParameterError
from rapid_llm.evaluation.tasks.base import Source

DEPTHS = ("0–20 %", "20–40 %", "40–60 %", "60–80 %", "80–100 %")


class Passages:
    """The passages of a file, of which contexts of ``source.context_tokens`` tokens are made."""

    def __init__(self, path: Path, texts: Sequence[str], source: Source) -> None:
        self._path, self._texts, self._source = path, texts, source
        self._tokens = [self._length(text) for text in texts]

    def fill(
        self, kept: Sequence[str], banned: AbstractSet[int], draw: str
    ) -> tuple[list[str], str]:
        """Fill a context with randomly drawn passages around required texts.

        Args:
            kept: required texts, placed in this order at random positions.
            banned: indices of passages that are not drawn.
            draw: seed of the draws, in addition to the source's.

        Returns:
            The passages in order, and the depth group of the first required text.

        Raises:
            InvalidParameterError: the required texts are longer than the context.
            DataError: all passages together are shorter than the context.
        """
        rng, tokens = Random(f"{self._source.seed}/{draw}"), self._source.context_tokens or 0
        room = tokens - sum(map(self._length, kept))
        if room < 0:
            raise InvalidParameterError(
                f"context_tokens={tokens} is too short for {tokens - room} tokens of "
                f"{self._path} that have to be in the context: give at least {tokens - room}"
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
                f"{self._path} holds passages for a context of {tokens - room} tokens, not of "
                f"context_tokens={tokens}: lower it, or give a larger file with --data PATH"
            )
        gaps = sorted(rng.randint(0, len(texts)) for _ in kept)
        places = [gap + before for before, gap in enumerate(gaps)]
        for place, text in zip(places, kept, strict=True):
            texts.insert(place, text)
        lengths = [*map(len, texts)]
        return texts, depth_group(sum(lengths[: places[0]]) / sum(lengths) if places else 0)

    def _length(self, text: str) -> int:
        return len(encode_literal(SEPARATOR + text, self._source.tokenizer))


def depth_group(depth: float) -> str:
    """Name of the fifth of a context that a depth from 0 (its beginning) to 1 is in."""
    return DEPTHS[min(int(depth * len(DEPTHS)), len(DEPTHS) - 1)]
