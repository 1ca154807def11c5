"""How an answer is compared with the references: a number in [0, 1].

Words are compared as the SQuAD v1.1 script compares them (Rajpurkar et al. 2016), which ∞Bench and
Lost in the Middle took over; ROUGE is google-research's ``rouge-score``.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from rapid_llm.errors import MissingDependencyError

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces."""
    words = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(words.split())


def contains(answer: str, references: Sequence[str]) -> float:
    """1 if a reference stands in the answer, both normalised; else 0.

    Lost in the Middle calls it ``best_subspan_em`` (Liu et al. 2023).
    """
    found = normalise(answer)
    return float(any(normalise(reference) in found for reference in references))


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is a reference, both normalised; else 0."""
    return float(normalise(answer) in map(normalise, references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """F1 of the normalised words in common with the reference that gives the most."""
    return max(_f1(normalise(answer).split(), normalise(r).split()) for r in references)


def _f1(answer: list[str], reference: list[str]) -> float:
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F of the longest common subsequence of words, best of the references."""
    return _rouge("rougeL", answer, references)


def rouge_lsum(answer: str, references: Sequence[str]) -> float:
    """F of the union of the sentences' longest common subsequences, best of the references.

    A sentence is a line, as in the ``evaluate`` library's ROUGE, which ∞Bench uses.
    """
    return _rouge("rougeLsum", answer, references)


def _rouge(kind: str, answer: str, references: Sequence[str]) -> float:
    return float(_rouge_scorer(kind).score_multi(list(references), answer)[kind].fmeasure)


@cache
def _rouge_scorer(kind: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingDependencyError(
            "ROUGE needs the package rouge-score, which is not installed: "
            'install it with pip install "rapid-llm[eval]"'
        ) from error
    return RougeScorer([kind])
