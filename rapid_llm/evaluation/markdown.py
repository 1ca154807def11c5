"""Numbers and tables as a report shows them; shares in percent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isnan
from typing import TypeVar

from rapid_llm.evaluation.intervals import Interval

NONE = "–"

T = TypeVar("T")


def table(rows: Iterable[T], *columns: tuple[str, Callable[[T], str]]) -> str:
    """A line a row; a column a header with what it says of a row.

    The first column is aligned to the left, the others to the right.
    """
    header = [name for name, _ in columns]
    rule = [":--", *["--:"] * (len(columns) - 1)]
    lines = [header, rule, *([say(row) for _, say in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def estimate(value: Interval | None) -> str:
    """In percent, with the interval where it is known: ``42.8 [38.1, 47.6]``."""
    return _estimate(value, ".1f")


def change(value: Interval | None) -> str:
    """Likewise with signs, in points: ``+3.5 [-0.2, +7.1]``."""
    return _estimate(value, "+.1f")


def _estimate(value: Interval | None, shape: str) -> str:
    if value is None:
        return NONE
    centre, low, high = (f"{100 * part:{shape}}" for part in value)
    return centre if isnan(value.low) else f"{centre} [{low}, {high}]"
