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


def score_table(summary: Summary, metrics: Mapping[str, MetricKind]) -> Table:
    """A row a method: its scores, and the difference of the headline to the baseline's."""
    headline = next(iter(metrics))
    table = _table("method", "n", *metrics, f"{headline}\n− {BASELINE}")
    for row in summary.rows:
        table.add_row(
            row.method,
            str(row.items),
            *(_percent(row.scores[name]) for name in metrics),
            _NONE if row.difference is None else _percent(row.difference, "+"),
        )
    skipped = [f"{row.method} {row.fell_back}" for row in summary.rows if row.fell_back]
    if skipped:
        table.caption = f"nothing was retrieved, and {BASELINE} answered: " + "; ".join(skipped)
    return table


def speed_table(summary: Summary) -> Table:
    """A row a method: speed, acceptance, and how often an answer stood in what was retrieved."""
    names = ("tokens/s", f"÷ {BASELINE}", "accepted", "a", "tokens\na round", "retrieved")
    table = _table("method", *names)
    for row in summary.rows:
        table.add_row(
            row.method,
            _number(row.tokens_per_second, 1),
            _number(row.speedup, 2),
            _number(row.acceptance_ratio, 2),
            _number(row.acceptance_rate, 2),
            _number(row.tokens_per_round, 1),
            _number(row.retrieved, 2),
        )
    return table


def group_tables(summary: Summary, metrics: Mapping[str, MetricKind]) -> Iterator[Table]:
    """The headline by group: a row a method, a column a value."""
    headline = next(iter(metrics))
    for name, values in summary.groups.items():
        counts = {value: max(row.items for row in rows) for value, rows in values.items()}
        headings = (f"{value}\n(n = {count})" for value, count in counts.items())
        table = _table(f"{headline} by {name}", *headings)
        scores: dict[str, dict[str, Interval]] = {}
        for value, rows in values.items():
            for row in rows:
                scores.setdefault(row.method, {})[value] = row.scores[headline]
        for method, by_value in scores.items():
            cells = [_percent(by_value[v]) if v in by_value else _NONE for v in values]
            table.add_row(method, *cells)
        yield table


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _percent(value: Interval, sign: str = "") -> str:
    middle = f"{100 * value.value:{sign}.1f}"
    if isnan(value.low):
        return middle
    low, high = (_short(100 * bound) for bound in (value.low, value.high))
    return f"{middle} ({low}, {high})"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 9.95 else f"{value:.1f}"


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"
