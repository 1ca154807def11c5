"""Results of a bench: rows in sections, ready for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Row:
    """A measured quantity."""

    key: str  # name in JSON
    label: str  # name in tables
    unit: str
    samples: list[float]  # a value for each counted run; empty where nothing could be measured
    note: str = ""
    simulated: bool = False  # whether acceptance was simulated
    columns: dict[str, float] = field(default_factory=dict)  # further numbers by heading

    @property
    def median(self) -> float | None:
        """Median of the samples; None without samples."""
        return median(self.samples) if self.samples else None


@dataclass(frozen=True)
class Section:
    """The rows of one step of a bench."""

    name: str
    context: int | None  # context length in tokens; None where it does not matter
    rows: list[Row]
    failed: str | None  # reason why rows are missing; None if the step succeeded
    seconds: float  # duration of the step


@dataclass
class Report:
    """Results of a bench."""

    name: str  # of the model or shape
    facts: dict[str, Any]  # facts about model, machine and method, by name
    sections: list[Section] = field(default_factory=list)  # of the finished steps
    seconds: float = 0.0  # duration so far

    @property
    def failed(self) -> bool:
        """Whether any step failed."""
        return any(section.failed for section in self.sections)

    def row(self, key: str, context: int | None = None) -> Row | None:
        """The row of a key and context length; None where it was not measured."""
        rows = (row for s in self.sections if s.context == context for row in s.rows)
        return next((row for row in rows if row.key == key), None)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        sections = [
            asdict(section) | {"rows": [asdict(r) | {"median": r.median} for r in section.rows]}
            for section in self.sections
        ]
        return {**self.facts, "sections": sections, "seconds": self.seconds}
