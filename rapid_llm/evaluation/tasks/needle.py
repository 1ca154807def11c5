"""Invented facts hidden in real prose: a needle in a haystack (Kamradt 2023), made on the spot.

Several facts of one pattern or another stand in the text; one of them is asked. Its names and its
answer occur nowhere else, so no other sentence answers the question.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from random import Random

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.context.documents import read_document
from rapid_llm.context.prompts import build_messages
from rapid_llm.encoding import encode_literal, literal_encoding
from rapid_llm.errors import DataError, InvalidParameterError
from rapid_llm.evaluation.scoring import contains, normalise
from rapid_llm.evaluation.tasks.base import CONTEXT, SHORT_ANSWER, Benchmark, Item
from rapid_llm.evaluation.tasks.passages import DEPTHS, depth_group

DEFAULT_LIMIT = 100
FACTS = 4

# Where a sentence ends, but no abbreviation such as "n." or "adj." does.
_SENTENCE_END = re.compile(r"(?<=\w{4}[.!?])\s+(?=[\"'(]?[A-Z])")

# The fact, the question, and which of the names in it is the answer.
PATTERNS = (
    ("{person} of {town} keeps the {thing} in the {room}.",
     "In which room does {person} of {town} keep the {thing}?", "room"),
    ("The {thing} of {town} was made by {person}.",
     "Who made the {thing} of {town}?", "person"),
    ("{person} paid {number} crowns for the {thing}.",
     "How many crowns did {person} pay for the {thing}?", "number"),
    ("The {thing} that {person} lost was found at {town}.",
     "Where was the {thing} that {person} lost found?", "town"),
    ("The password of {person}, the clerk of {town}, is {number}.",
     "What is the password of {person}, the clerk of {town}?", "number"),
    ("{person} travelled to {town} to sell the {thing}.",
     "What did {person} travel to {town} to sell?", "thing"),
    ("The house of {person} in {town} has the number {number}.",
     "What number has the house of {person} in {town}?", "number"),
    ("Every evening {person} feeds the {animal} of {town}.",
     "Which animal of {town} does {person} feed every evening?", "animal"),
)  # fmt: skip
NAMES = {
    "person": (
        ("Adela", "Bruno", "Cosima", "Dmitri", "Edda", "Florian", "Greta", "Hanno", "Ilse",
         "Jorin", "Katya", "Lorenz", "Mirela", "Nestor", "Odile", "Pavel"),
        ("Arkwright", "Bellweather", "Castellan", "Drumgold", "Eversley", "Fennimore",
         "Grimsdale", "Hollander", "Ivanko", "Jesperson", "Kettering", "Lindqvist", "Marchbanks",
         "Novotny", "Ostrander", "Pemberley"),
    ),
    "town": (
        ("Alder", "Birken", "Cold", "Dun", "Elm", "Fern", "Gorse", "Hazel", "Ivel", "Kil", "Lin",
         "Maple", "Nether", "Otter", "Raven", "Thorn"),
        ("bridge", "combe", "dale", "ford", "gate", "haven", "holm", "leigh", "mere", "minster",
         "mouth", "stead", "thwaite", "wick"),
    ),
    "thing": (
        ("copper", "crimson", "ebony", "gilded", "ivory", "jade", "lacquered", "marble", "pewter",
         "porcelain", "silver", "turquoise", "velvet", "walnut"),
        ("accordion", "barometer", "bracelet", "candelabrum", "chessboard", "clock", "compass",
         "goblet", "harpsichord", "lantern", "sextant", "snuffbox", "telescope", "umbrella"),
    ),
    "room": (
        ("blue", "eastern", "green", "lower", "northern", "southern", "upper", "western"),
        ("attic", "cellar", "conservatory", "gallery", "laundry", "library", "nursery",
         "pantry", "scullery", "stable"),
    ),
    "animal": (
        ("brindled", "freckled", "lame", "one-eyed", "piebald", "shaggy", "spotted", "tame"),
        ("badger", "buzzard", "ferret", "heron", "lynx", "marmot", "otter", "pelican", "tortoise",
         "weasel"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """A sentence to hide, the question that it answers, and the answer."""

    sentence: str
    question: str
    answer: str


def load(
    data: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    context_tokens: int,
    limit: int | None,
    seed: int,
) -> Benchmark:
    """``limit`` items (100), which ask at the five fifths of the context by turns.

    An item's facts depend on the seed and its number alone, whatever the length of the context.

    Args:
        data: a document of prose; None takes the bundled excerpt of The Devil's Dictionary.
        tokenizer: the target's fast tokenizer.
        context_tokens: of the text with its facts, which is at most so long.
        limit: number of items.
        seed: of the facts and their places.

    Raises:
        DocumentError: the document cannot be read.
        DataError: it has no sentences.
        InvalidParameterError: ``context_tokens`` leaves no room for the text.
    """
    text = read_document(data) if data else bundled()
    haystack = _Haystack(text.strip(), str(data), tokenizer)
    plain = f" {normalise(text)} "
    items = []
    for number in range(limit if limit is not None else DEFAULT_LIMIT):
        rng = Random(f"{seed}/{number}")
        facts = draw_facts(rng, plain)
        depths = [(number % len(DEPTHS) + rng.random()) / len(DEPTHS)]
        depths += [rng.random() for _ in facts[1:]]
        context = haystack.hide([f.sentence for f in facts], depths, context_tokens, rng.random())
        asked = facts[0]
        items.append(
            Item(
                id=str(number + 1),
                context=context,
                query=asked.question,
                messages=tuple(build_messages(CONTEXT, asked.question, instruction=SHORT_ANSWER)),
                references=(asked.answer,),
                max_new_tokens=32,
                groups={"depth": depth_group(context.index(asked.sentence) / len(context))},
            )
        )
    return Benchmark("needle", {"contains": "rate"}, items, _score)


def bundled() -> str:
    """The excerpt that the package carries, about 7,000 tokens."""
    path = resources.files("rapid_llm") / "data" / "devils-dictionary.txt"
    return path.read_text(encoding="utf-8")


def draw_facts(rng: Random, text: str) -> list[Fact]:
    """:data:`FACTS` facts with no name in common, and none that stands in the normalised text."""
    used: set[str] = set()
    facts = []
    for _ in range(FACTS):
        sentence, question, kind = rng.choice(PATTERNS)
        names = {"number": _draw(rng, "number", text, used)}
        names |= {name: _draw(rng, name, text, used) for name in NAMES}
        facts.append(Fact(sentence.format(**names), question.format(**names), names[kind]))
    return facts


def _draw(rng: Random, kind: str, text: str, used: set[str]) -> str:
    """A name that is not in the text, and none of whose words was used before."""
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
    """A text that is repeated or cut to a length, and in which sentences are hidden."""

    def __init__(self, text: str, source: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._text = text
        self._tokenizer = tokenizer
        self._tokens = len(encode_literal(text, tokenizer))
        self._starts = [0, *(match.end() for match in _SENTENCE_END.finditer(text))]
        if len(self._starts) < 2 * FACTS:
            raise DataError(
                f"{source} has {len(self._starts)} sentences to hide {FACTS} facts between: give "
                "a longer text of prose with --data PATH"
            )

    def hide(self, sentences: list[str], depths: list[float], max_tokens: int, start: float) -> str:
        """The text from the sentence at ``start`` on, with each sentence at its depth.

        Args:
            sentences: to hide.
            depths: from 0 to 1, one a sentence; it goes between the two sentences next to it.
            max_tokens: of the result, which is hardly shorter.
            start: from 0 to 1.
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
            room -= excess  # a sentence can meet its neighbours in a token more
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


def _score(item: Item, answer: str) -> dict[str, float]:
    return {"contains": contains(answer, item.references)}
