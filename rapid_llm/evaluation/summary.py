"""What the records of a run say of each method, on all items and in each of their groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from typing import TYPE_CHECKING, Any

from rapid_llm.evaluation.intervals import Interval, difference, interval
from rapid_llm.evaluation.records import Record, add_positions

if TYPE_CHECKING:
    from rapid_llm.evaluation.tasks.base import MetricKind

BASELINE = "lc"
"""The method that the others are compared with: the target alone over the whole context."""


@dataclass(frozen=True)
class Row:
    """One method on some items. What does not apply, or was not measured, is None.

    Attributes:
        method, base, options: as in the records.
        items: how many it answered.
        scores: by metric, the headline first.
        difference: of the headline to ``lc``'s, on the items that both answered.
        tokens_per_second: all tokens ÷ all seconds of decoding (reading the prompts left out).
        speedup: this ÷ ``lc``'s, both on the items that both answered.
        acceptance_ratio: accepted ÷ drafted tokens.
        acceptance_rate: accepted ÷ judged tokens, those after a rejection not being judged.
        tokens_per_round: tokens ÷ verification passes.
        accepted_at: for each position of a draft: (times judged, times accepted).
        retrieved: the share of items with a reference in what the drafter read.
        fell_back: items for which nothing was retrieved, so that ``lc`` answered.
    """

    method: str
    base: str
    options: Mapping[str, Any]
    items: int
    scores: Mapping[str, Interval]
    difference: Interval | None
    tokens_per_second: float | None
    speedup: float | None
    acceptance_ratio: float | None
    acceptance_rate: float | None
    tokens_per_round: float | None
    accepted_at: tuple[tuple[int, int], ...]
    retrieved: float | None
    fell_back: int


@dataclass(frozen=True)
class Summary:
    """Attributes:
    rows: a method each, in the order in which they were first run.
    groups: the same by group and value, such as ``groups["difficulty"]["hard"]``.
    """

    rows: tuple[Row, ...]
    groups: Mapping[str, Mapping[str, tuple[Row, ...]]]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: an unknown bound is None."""
        return {
            "rows": [_plain(row) for row in self.rows],
            "groups": {
                name: {value: [_plain(row) for row in rows] for value, rows in values.items()}
                for name, values in self.groups.items()
            },
        }


def summarize(records: Iterable[Record], metrics: Mapping[str, MetricKind]) -> Summary:
    """Compare the methods of a run.

    Args:
        records: in any number, such as those of a run that is under way.
        metrics: the task's, its headline first (``read_settings(folder)["metrics"]``).
    """
    answers = list(records)
    groups: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in answers:
        for name, value in record.groups.items():
            groups[name][value].append(record)
    return Summary(
        rows=_rows(answers, metrics),
        groups={
            name: {value: _rows(some, metrics) for value, some in sorted(values.items())}
            for name, values in sorted(groups.items())
        },
    )


def _rows(records: Sequence[Record], metrics: Mapping[str, MetricKind]) -> tuple[Row, ...]:
    methods: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        methods[record.method][record.item] = record
    baseline = methods.get(BASELINE, {})
    return tuple(_row(answers, baseline, metrics) for answers in methods.values())


def _row(
    answers: Mapping[str, Record],
    baseline: Mapping[str, Record],
    metrics: Mapping[str, MetricKind],
) -> Row:
    records = list(answers.values())
    first, headline = records[0], next(iter(metrics))
    both = [item for item in answers if item in baseline and first.method != BASELINE]
    ours, theirs = [answers[item] for item in both], [baseline[item] for item in both]
    drafted, accepted = _total(records, "drafted_tokens"), _total(records, "accepted_tokens")
    seen = [record.retrieved for record in records if record.retrieved is not None]
    return Row(
        method=first.method,
        base=first.base,
        options=first.options,
        items=len(records),
        scores={
            name: interval([record.scores[name] for record in records], kind)
            for name, kind in metrics.items()
        },
        difference=difference(_scores(ours, headline), _scores(theirs, headline)) if both else None,
        tokens_per_second=_speed(records),
        speedup=_ratio(_speed(ours), _speed(theirs)),
        acceptance_ratio=_ratio(accepted, drafted),
        acceptance_rate=_ratio(accepted, accepted + _total(records, "rejections")),
        tokens_per_round=_ratio(_total(records, "completion_tokens"), _total(records, "rounds")),
        accepted_at=add_positions(record.accepted_at for record in records),
        retrieved=_ratio(sum(seen), len(seen)),
        fell_back=sum(record.stats.get("draft_skipped") is not None for record in records),
    )


def _scores(records: Iterable[Record], metric: str) -> list[float]:
    return [record.scores[metric] for record in records]


def _total(records: Iterable[Record], stat: str) -> float:
    return sum(record.stats.get(stat, 0) for record in records)


def _speed(records: Sequence[Record]) -> float | None:
    return _ratio(_total(records, "completion_tokens"), _total(records, "decode_seconds"))


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _plain(row: Row) -> dict[str, Any]:
    return asdict(row) | {
        "scores": {name: _bounds(score) for name, score in row.scores.items()},
        "difference": None if row.difference is None else _bounds(row.difference),
    }


def _bounds(value: Interval) -> dict[str, float | None]:
    return {name: None if isnan(x) else x for name, x in value._asdict().items()}
