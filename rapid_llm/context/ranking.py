"""Rankings of chunks by their words, and one ranking made of two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rapid_llm.errors import MissingDependencyError

_RANK_CONSTANT = 60  # Cormack et al. 2009


def bm25(texts: Sequence[str], question: str) -> list[float]:
    """The BM25 score of each text (Robertson et al. 1994, in Lucene's variant), at least 0.

    A text without a word of the question's has 0; English function words do not count.

    Raises:
        MissingDependencyError: bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError as error:
        raise MissingDependencyError(
            'retriever="bm25" and "hybrid" need the package bm25s; '
            'run: pip install "rapid-llm[eval]"'
        ) from error
    *words, asked = bm25s.tokenize(
        [*texts, question], stopwords="english_plus", return_ids=False, show_progress=False
    )
    known = set(asked) & set().union(*words)
    if not known:
        return [0.0] * len(texts)
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    return [float(score) for score in index.get_scores([word for word in asked if word in known])]


def fuse(*scores: Sequence[float]) -> list[float]:
    """Reciprocal rank fusion (Cormack et al. 2009): Σ 1 / (60 + rank) over several scorings of the
    same texts. Equal scores have one rank, the best that any of them could have."""
    total = np.zeros(len(scores[0]))
    for some in scores:
        worst_first = -np.asarray(some)
        ranks = 1 + np.searchsorted(np.sort(worst_first), worst_first)
        total += 1 / (_RANK_CONSTANT + ranks)
    return [float(score) for score in total]
