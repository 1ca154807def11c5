"""Needle in a haystack (Kamradt 2023): invented facts hidden in prose.

Several facts are hidden in the text, and one of them is asked for. Its names and its answer occur
nowhere else, so no other sentence answers the question.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from random import Random
from typing import NamedTuple

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.context.documents import read_document
from rapid_llm.encoding import encode_literal, literal_encoding
from rapid_llm.errors import DataError, InvalidParameterError
from rapid_llm.evaluation.scoring import contains, normalise
from rapid_llm.evaluation.tasks.base import DEPTHS, Item, Source, Task, brief, depth_group
from rapid_llm.folders import packaged_text

DEFAULT_LIMIT = 100
FACTS = 4

# End of a sentence, but not of an abbreviation such as "n." or "adj.".
_SENTENCE_END = re.compile(r"(?<=\w{4}[.!?])\s+(?=[\"'(]?[A-Z])")

# Patterns of a fact, of its question, and the kind of name that is the answer; words of names.
_WORDS = json.loads(packaged_text("needle.json"))
PATTERNS: list[tuple[str, str, str]] = _WORDS["patterns"]
NAMES: dict[str, list[list[str]]] = _WORDS["names"]


class Fact(NamedTuple):
    """A sentence to hide, the question that it answers, and the answer."""

    sentence: str
    question: str
    answer: str


def load(source: Source) -> Task:
    """Make items whose facts lie in each fifth of the context in turn.

    The text is a document of prose, or the packaged excerpt of The Devil's Dictionary. An item's
    facts depend on the seed and its number only, not on the length of the context.
    """
    text = read_document(source.data) if source.data else packaged_text("devils-dictionary.txt")
    haystack = _Haystack(text.strip(), str(source.data), source.tokenizer)
    plain = f" {normalise(text)} "
    items = []
    for number in range(DEFAULT_LIMIT if source.limit is None else source.limit):
        rng = Random(f"{source.seed}/{number}")
        facts = draw_facts(rng, plain)
        depths = [(number % len(DEPTHS) + rng.random()) / len(DEPTHS)]
        depths += [rng.random() for _ in facts[1:]]
        sentences, asked = [fact.sentence for fact in facts], facts[0]
        context = haystack.hide(sentences, depths, source.context_tokens or 0, rng.random())
        item = Item(
            id=str(number + 1),
            context=context,
            query=asked.question,
            messages=brief(asked.question),
            references=(asked.answer,),
            max_new_tokens=32,
            groups={"depth": depth_group(context.index(asked.sentence) / len(context))},
        )
        items.append(item)
    return Task(
        "needle",
        {"contains": "rate"},
        items,
        lambda item, answer: {"contains": contains(answer, item.references)},
    )


def draw_facts(rng: Random, text: str) -> list[Fact]:
    """:data:`FACTS` facts without a shared name, and without a name of the normalised text."""
    used: set[str] = set()
    facts = []
    for _ in range(FACTS):
        sentence, question, kind = rng.choice(PATTERNS)
        names = {name: _draw(rng, name, text, used) for name in ("number", *NAMES)}
        facts.append(Fact(sentence.format(**names), question.format(**names), names[kind]))
    return facts


def _draw(rng: Random, kind: str, text: str, used: set[str]) -> str:
    """A name that is not in the text, without words that were used before."""
    while True:
        if kind == "number":
            parts = [str(rng.randrange(10_000, 100_000))]
        else:
            parts = [rng.choice(words) for words in NAMES[kind]]
        name = ("" if kind == "town" else " ").join(parts)
        if used.isdisjoint(parts) and f" {normalise(name)} " not in text:
            used.update(parts)
            return name


class _Haystack:
    """A text that is repeated or cut to a length, and hides sentences."""

    def __init__(self, text: str, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._text = text
        self._tokenizer = tokenizer
        self._tokens = len(encode_literal(text, tokenizer))
        self._starts = [0, *(match.end() for match in _SENTENCE_END.finditer(text))]
        if len(self._starts) < 2 * FACTS:
            raise DataError(
                f"{path} has {len(self._starts)} sentences to hide {FACTS} facts between: give "
                "a longer text of prose with --data PATH"
            )

    def hide(self, sentences: list[str], depths: list[float], max_tokens: int, start: float) -> str:
        """The text with hidden sentences, each at its depth from 0 to 1, ``max_tokens`` long.

        It begins at the position ``start`` from 0 to 1; its beginning follows its end.
        """
        at = self._starts[int(start * len(self._starts))]
        turned = f"{self._text[at:]}\n\n{self._text[:at]}".strip()
        text = "\n\n".join([turned] * (max_tokens // self._tokens + 1))
        offsets = literal_encoding(text, self._tokenizer).offsets
        room = max_tokens - sum(len(encode_literal(f" {s}", self._tokenizer)) for s in sentences)
        while room > 0:
            hidden = _insert(text[: offsets[min(room, len(offsets)) - 1][1]], sentences, depths)
            excess = len(encode_literal(hidden, self._tokenizer)) - max_tokens
            if excess <= 0:
                return hidden
            room -= excess  # joined sentences can have more tokens than their parts
        raise InvalidParameterError(
            f"context_tokens={max_tokens} leaves no room for a text around {FACTS} facts: "
            f"give at least {max_tokens - room + 100}"
        )


def _insert(text: str, sentences: list[str], depths: list[float]) -> str:
    ends = [match.start() for match in _SENTENCE_END.finditer(text)] or [len(text)]
    places = [ends[min(bisect_left(ends, d * len(text)), len(ends) - 1)] for d in depths]
    for place, sentence in sorted(zip(places, sentences, strict=True), reverse=True):
        text = f"{text[:place]} {sentence}{text[place:]}"
    return text
