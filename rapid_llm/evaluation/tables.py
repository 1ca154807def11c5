"""A run's summary on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isnan

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rapid_llm.evaluation.intervals import Interval
from rapid_llm.evaluation.summary import BASELINE, Summary
from rapid_llm.evaluation.tasks.base import MetricKind

_NONE = "–"


def heading(task: str, model: str, summary: Summary) -> str:
    items = max((row.items for row in summary.rows), default=0)
    return (
        f"{task}, {model}, {items} items; scores in per cent with 95 % intervals (rates: Wilson, "
        "means: bootstrap), differences of pairs on the same items"
    )


def summary_table(summary: Summary, metrics: Mapping[str, MetricKind]) -> Table:
    """A row a method."""
    table = Table("method", box=SIMPLE_HEAD)
    headline = next(iter(metrics))
    measured = ("n", *metrics, f"{headline}\n− {BASELINE}", "tokens/s", f"÷ {BASELINE}")
    for name in (*measured, "accepted", "a", "tokens\na round", "found"):
        table.add_column(name, justify="right")
    for row in summary.rows:
        table.add_row(
            row.method,
            str(row.items),
            *(_percent(row.scores[name]) for name in metrics),
            _NONE if row.difference is None else _percent(row.difference, "+"),
            _number(row.tokens_per_second, 1),
            _number(row.speedup, 2),
            _number(row.acceptance_ratio, 2),
            _number(row.acceptance_rate, 2),
            _number(row.tokens_per_round, 1),
            _number(row.retrieved, 2),
        )
    skipped = [f"{row.method} {row.fell_back}" for row in summary.rows if row.fell_back]
    if skipped:
        table.caption = f"nothing was retrieved, and {BASELINE} answered: " + "; ".join(skipped)
    return table


def group_tables(summary: Summary, metrics: Mapping[str, MetricKind]) -> Iterator[Table]:
    """The headline by group: a row a method, a column a value."""
    headline = next(iter(metrics))
    for name, values in summary.groups.items():
        table = Table(f"{headline} by {name}", box=SIMPLE_HEAD)
        scores: dict[str, dict[str, Interval]] = {}
        for value, rows in values.items():
            table.add_column(f"{value}\n(n = {max(row.items for row in rows)})", justify="right")
            for row in rows:
                scores.setdefault(row.method, {})[value] = row.scores[headline]
        for method, by_value in scores.items():
            cells = [_percent(by_value[v]) if v in by_value else _NONE for v in values]
            table.add_row(method, *cells)
        yield table


def _percent(value: Interval, sign: str = "") -> str:
    middle, low, high = (f"{100 * x:{sign}.1f}" for x in value)
    return middle if isnan(value.low) else f"{middle} [{low}, {high}]"


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"
