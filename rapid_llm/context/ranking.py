"""Rank chunks by BM25, and fuse rankings."""

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
# Runs of one script that puts no space between words. The script often changes where a word ends:
# kanji before kana, a Latin name in Thai.
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
    """BM25 score of each text (Robertson et al. 1994, in Lucene's variant), at least 0.

    A text without any word of the question gets 0; English function words do not count. For
    scripts without spaces between words, bigrams of characters are used, as in Lucene's analyzer
    of Chinese, Japanese and Korean.

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
    """Reciprocal rank fusion (Cormack et al. 2009): Σ 1 / (60 + rank) over several scorings.

    Args:
        scores: several scorings of the same texts. Equal scores share the best of their ranks; a
            score of -inf means not retrieved, and adds nothing.

    Returns:
        Fused score of each text.
    """
    total = np.zeros(len(scores[0]))
    for some in scores:
        worst_first = -np.asarray(some)
        ranks = 1 + np.searchsorted(np.sort(worst_first), worst_first)
        total += np.where(worst_first == inf, 0, 1 / (_RANK_CONSTANT + ranks))
    return [float(score) for score in total]


def _terms(text: str, *, single: bool) -> Iterator[str]:
    """Normalized index terms of a text.

    Args:
        text: the text.
        single: whether to give every single Chinese character beside the bigrams, as for indexed
            texts. For a question only isolated characters are given, so that it matches by words
            and not by their parts.
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
    # Skip single letters, mostly left over from an apostrophe.
    if len(word) > 1 or word.isdigit():
        yield word


def _unspaced(run: str, *, single: bool) -> Iterator[str]:
    characters = _CHARACTER.findall(run) if _MARK.search(run) else list(run)
    yield from map("".join, pairwise(characters))
    if _HAN.match(run) and (single or len(characters) == 1):
        yield from characters
