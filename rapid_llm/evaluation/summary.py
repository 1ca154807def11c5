"""Summarise the records of a run per method, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from rapid_llm.evaluation.journal import Record, add_positions

BASELINE = "lc"
"""Method that the others are compared with: the target alone over the whole context."""

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean with its 95 % interval, whose bounds are None for a single number."""

    value: float
    low: float | None
    high: float | None


def rate(outcomes: Sequence[float]) -> Interval:
    """The share of ones in zeros and ones, with Wilson's score interval (Wilson 1927)."""
    hits, n = round(sum(outcomes)), len(outcomes)
    low, high = stats.binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(hits / n, float(low), float(high))


def mean(values: Sequence[float]) -> Interval:
    """The mean, with the bias-corrected bootstrap interval (BCa, Efron 1987) of a fixed seed."""
    centre = float(np.mean(values))
    if len(values) == 1:
        return Interval(centre, None, None)
    if np.ptp(values) < 1e-12:  # equal values resample to themselves; scipy's bounds would be nan
        return Interval(centre, centre, centre)
    found = stats.bootstrap((values,), np.mean, confidence_level=CONFIDENCE, rng=0, batch=1000)
    low, high = found.confidence_interval
    return Interval(centre, float(low), float(high))


def summarize(records: Iterable[Record], metrics: Mapping[str, str]) -> dict[str, Any]:
    """Compare the methods of a run, finished or not, by the task's metrics, the headline first.

    Returns ``rows`` with a row per method, in the order of the run, and ``groups`` with such rows
    by group and value, such as ``groups["difficulty"]["hard"]``; ready for JSON.
    """
    records = list(records)
    groups: dict[str, dict[str, Any]] = {}
    for name, value in sorted({pair for record in records for pair in record.groups.items()}):
        some = [record for record in records if record.groups.get(name) == value]
        groups.setdefault(name, {})[value] = _rows(some, metrics)
    return {"rows": _rows(records, metrics), "groups": groups}


def _rows(records: Sequence[Record], metrics: Mapping[str, str]) -> list[dict[str, Any]]:
    methods: dict[str, dict[str, Record]] = {}
    for record in records:
        methods.setdefault(record.method, {})[record.item] = record
    baseline = methods.get(BASELINE, {})
    return [_row([*some.values()], baseline, metrics) for some in methods.values()]


def _row(
    records: Sequence[Record], baseline: Mapping[str, Record], metrics: Mapping[str, str]
) -> dict[str, Any]:
    """Row of one method on some items; values that do not apply or are unknown are None."""
    first, headline = records[0], next(iter(metrics))
    ours = [record for record in records if record.item in baseline and record.method != BASELINE]
    theirs = [baseline[record.item] for record in ours]
    pairs = zip(ours, theirs, strict=True)
    differences = [one.scores[headline] - other.scores[headline] for one, other in pairs]
    accepted = _total(records, "accepted_tokens")
    seen = [record.retrieved for record in records if record.retrieved is not None]
    return {
        "method": first.method,
        "base": first.base,
        "options": dict(first.options),
        "items": len(records),
        "scores": {
            name: (rate if kind == "rate" else mean)(
                [one.scores[name] for one in records]
            )._asdict()
            for name, kind in metrics.items()
        },
        # Paired difference of the headline to lc's on the same items, which has a smaller variance.
        "difference": mean(differences)._asdict() if differences else None,
        # All tokens ÷ all seconds of decoding, without the prefill, if each was decoded alone.
        "tokens_per_second": _speed(records),
        "speedup": _ratio(_speed(ours), _speed(theirs)),
        "acceptance_ratio": _ratio(accepted, _total(records, "drafted_tokens")),
        # Share of the judged tokens; those after a rejection are not judged.
        "acceptance_rate": _ratio(accepted, accepted + _total(records, "rejections")),
        "tokens_per_round": _ratio(_total(records, "completion_tokens"), _total(records, "rounds")),
        "accepted_at": add_positions(record.accepted_at for record in records),
        # Share of items with a reference in the retrieved text.
        "retrieved": _ratio(sum(seen), len(seen)),
        # Number of items for which nothing was retrieved, so that lc answered.
        "fell_back": sum(record.stats.get("draft_skipped") is not None for record in records),
        "at_once": max(record.at_once for record in records),
    }


def _total(records: Iterable[Record], stat: str) -> float:
    return sum(record.stats.get(stat, 0) for record in records)


def _speed(records: Sequence[Record]) -> float | None:
    if any(record.at_once > 1 for record in records):
        return None
    return _ratio(_total(records, "completion_tokens"), _total(records, "decode_seconds"))


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
