"""95 % intervals: of rates, of means, and of differences between methods on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from rapid_llm.evaluation.tasks.base import MetricKind

CONFIDENCE = 0.95
_SEED = 0


class Interval(NamedTuple):
    """A mean with its 95 % interval; of a single number the bounds are nan: nothing is known."""

    value: float
    low: float
    high: float


def interval(values: Sequence[float], kind: MetricKind) -> Interval:
    """The mean of at least one value: Wilson's interval of a rate, the bootstrap's of a mean."""
    return rate(values) if kind == "rate" else mean(values)


def rate(outcomes: Sequence[float]) -> Interval:
    """The share of ones in zeros and ones, with Wilson's score interval (Wilson 1927)."""
    hits, n = round(sum(outcomes)), len(outcomes)
    low, high = stats.binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(hits / n, float(low), float(high))


def mean(values: Sequence[float]) -> Interval:
    """The mean, with the bias-corrected bootstrap interval (BCa, Efron 1987) of a fixed seed.

    Equal values resample to themselves, so that their interval has no width.
    """
    data = np.asarray(values, dtype=np.float64)
    centre = float(data.mean())
    if len(data) == 1:
        return Interval(centre, float("nan"), float("nan"))
    if np.ptp(data) < 1e-12:  # there the bootstrap's bounds would be nan
        return Interval(centre, centre, centre)
    found = stats.bootstrap((data,), np.mean, confidence_level=CONFIDENCE, rng=_SEED, batch=1000)
    bounds = found.confidence_interval
    return Interval(centre, float(bounds.low), float(bounds.high))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The mean of ``ours - theirs``, item by item: what items have in common cancels out."""
    return mean([a - b for a, b in zip(ours, theirs, strict=True)])
