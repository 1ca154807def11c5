"""How sure a retrieval was, for a dynamic η."""

from __future__ import annotations

from collections.abc import Sequence

LOW, HIGH = 0.2, 0.6
"""Cosine similarities at and below which nothing is believed, and at and above which all is."""


def confidence(scores: Sequence[float]) -> float:
    """Where the best chunk's cosine similarity lies between ``LOW`` and ``HIGH``, in [0, 1].

    Args:
        scores: cosine similarities of the retrieved chunks to the question; none give 0.
    """
    if not scores:
        return 0.0
    return min(1.0, max(0.0, (max(scores) - LOW) / (HIGH - LOW)))
