"""Confidence of a retrieval from its cosine similarities, for a dynamic η."""

from __future__ import annotations

from collections.abc import Sequence

LOW, HIGH = 0.2, 0.6
"""Cosine similarities that give confidence 0 (and below) and 1 (and above)."""


def confidence(scores: Sequence[float]) -> float:
    """Confidence in [0, 1]: position of the best similarity between ``LOW`` and ``HIGH``.

    Args:
        scores: cosine similarities of the retrieved chunks to the question; 0 if there are none.
    """
    if not scores:
        return 0.0
    return min(1.0, max(0.0, (max(scores) - LOW) / (HIGH - LOW)))
