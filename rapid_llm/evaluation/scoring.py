"""Score an answer against references, as a number in [0, 1].

Words are compared as the SQuAD v1.1 script compares them (Rajpurkar et al. 2016), which ∞Bench and
Lost in the Middle took over; ROUGE is google-research's ``rouge-score``.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def contains(answer: str, references: Sequence[str]) -> float:
    """1 if the answer contains a reference, both normalised; else 0.

    Lost in the Middle calls it ``best_subspan_em`` (Liu et al. 2023).
    """
    return float(any(normalise(reference) in normalise(answer) for reference in references))


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference, both normalised; else 0."""
    return float(normalise(answer) in map(normalise, references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """F1 of the normalised words shared with a reference, the best of all references."""
    said, *words = (Counter(normalise(text).split()) for text in (answer, *references))
    return max(2 * (said & own).total() / ((said + own).total() or 1) for own in words)


def rouge(kind: str, answer: str, references: Sequence[str]) -> float:
    """F-measure of ROUGE, the best of all references.

    ``kind`` is ``rougeL``, of the longest common subsequence of words; or ``rougeLsum``, of the
    union of those of the lines, each a sentence, as in the ``evaluate`` library.
    """
    from rouge_score.rouge_scorer import RougeScorer  # takes a second to import

    return float(RougeScorer([kind]).score_multi(list(references), answer)[kind].fmeasure)
