"""Rankings of chunks by their words, and one ranking made of two."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import inf

import numpy as np
import regex

from rapid_llm.errors import MissingDependencyError

_RANK_CONSTANT = 60  # Cormack et al. 2009

_WORD = regex.compile(r"[\p{L}\p{M}\p{N}_]+")
# Scripts that put no space between words. Runs of one script, as it often changes where a word
# ends: kanji before kana, a Latin name in Thai.
_UNSPACED = regex.compile(
    "|".join(
        rf"[\p{{scx={script}}}&&[\p{{L}}\p{{M}}\p{{Nl}}]]+"
        for script in (
            *("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Tangut", "Hangul"),
            *("Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Tai_Tham", "Tai_Le", "New_Tai_Lue"),
            *("Tai_Viet", "Javanese", "Balinese", "Sundanese", "Cham"),
        )
    ),
    flags=regex.VERSION1,
)
_HAN = regex.compile(r"\p{Han}")
_MARK = regex.compile(r"\p{M}")
_CHARACTER = regex.compile(r"\X")
_IGNORABLE = regex.compile(r"[\u00ad\u200c\u200d\u2060\ufe00-\ufe0f]")  # soft hyphens, joiners


def bm25(texts: Sequence[str], question: str) -> list[float]:
    """The BM25 score of each text (Robertson et al. 1994, in Lucene's variant), at least 0.

    A text without a word of the question's has 0; English function words do not count. Where a
    script puts no spaces between words, pairs of neighbouring characters stand for them, as in
    Lucene's analyzer of Chinese, Japanese and Korean.

    Raises:
        MissingDependencyError: bm25s is not installed.
    """
    try:
        import bm25s
        from bm25s.stopwords import STOPWORDS_EN_PLUS
    except ImportError as error:
        raise MissingDependencyError(
            'retriever="bm25" and "hybrid" need the package bm25s; '
            'run: pip install "rapid-llm[eval]"'
        ) from error
    function_words = frozenset(STOPWORDS_EN_PLUS)
    words = [
        [word for word in _terms(text, single=True) if word not in function_words] for text in texts
    ]
    known = set().union(*words)
    asked = [word for word in _terms(question, single=False) if word in known]
    if not asked:
        return [0.0] * len(texts)
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    return [float(score) for score in index.get_scores(asked)]


def fuse(*scores: Sequence[float]) -> list[float]:
    """Reciprocal rank fusion (Cormack et al. 2009): Σ 1 / (60 + rank) over several scorings of the
    same texts. Equal scores have one rank, the best that any of them could have; what a scoring
    did not retrieve has −inf there, and gets nothing from it."""
    total = np.zeros(len(scores[0]))
    for some in scores:
        worst_first = -np.asarray(some)
        ranks = 1 + np.searchsorted(np.sort(worst_first), worst_first)
        total += np.where(worst_first == inf, 0, 1 / (_RANK_CONSTANT + ranks))
    return [float(score) for score in total]


def _terms(text: str, *, single: bool) -> Iterator[str]:
    """What stands for the words of a text, spellings of one word made alike.

    Args:
        single: give each Chinese character too, beside its pairs. A question has those alone that
            stand on their own, so that it is found by its words and not by their parts.
    """
    plain = unicodedata.normalize("NFKC", _IGNORABLE.sub("", text)).casefold()
    for word in _WORD.finditer(plain):
        if word[0].isascii():
            yield from _spaced(word[0])
            continue
        end = word.start()
        for run in _UNSPACED.finditer(plain, word.start(), word.end()):
            yield from _spaced(plain[end : run.start()])
            yield from _unspaced(run[0], single=single)
            end = run.end()
        yield from _spaced(plain[end : word.end()])


def _spaced(word: str) -> Iterator[str]:
    # A letter alone is mostly what an apostrophe left over.
    if len(word) > 1 or word.isdigit():
        yield word


def _unspaced(run: str, *, single: bool) -> Iterator[str]:
    characters = _CHARACTER.findall(run) if _MARK.search(run) else list(run)
    yield from map("".join, pairwise(characters))
    if _HAN.match(run) and (single or len(characters) == 1):
        yield from characters
