"""Report of a bench: rows in sections, as tables, JSON and bar charts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.text import Text

from rapid_llm.console import as_text, number_table
from rapid_llm.figure import draw_bars

_WIDTH = 132
_DRAWN = ("tokens/s", "ms/token", "ms")


@dataclass(frozen=True)
class Row:
    """A quantity."""

    key: str
    label: str
    unit: str
    samples: list[float]  # one a counted run; empty where nothing could be measured
    note: str = ""  # what a number alone would not say
    simulated: bool = False  # whether a coin decided what was accepted
    columns: dict[str, float] = field(default_factory=dict)  # further figures, by their heading

    @property
    def median(self) -> float | None:
        """None without samples."""
        return median(self.samples) if self.samples else None

    @property
    def name(self) -> str:
        """The label, with the mark of what was simulated."""
        return f"{self.label} *" if self.simulated else self.label


@dataclass(frozen=True)
class Section:
    """What belongs together."""

    name: str
    context: int | None  # its length; None where any will do
    rows: list[Row]
    failed: str | None  # why there are not all rows; None where there are
    seconds: float  # that measuring took

    @property
    def title(self) -> str:
        return self.name if self.context is None else f"{self.name}, {self.context:,} tokens"

    def text(self) -> str:
        """A table, a line a row, with what failed below."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row.columns))
        failed = f"failed: {self.failed}" if self.failed else None
        table = number_table(
            "", ("", "", *columns), title=f"{self.title} ({self.seconds:.0f} s)",
            title_justify="left", caption=failed, caption_justify="left", show_header=bool(columns),
        )  # fmt: skip
        table.columns[0].no_wrap = True
        table.add_column("")  # of notes
        for row in self.rows:
            value = "–" if row.median is None else f"{_number(row.median)} {row.unit}".rstrip()
            ends = min(row.samples, default=0), max(row.samples, default=0)
            spread = f"({'–'.join(map(_number, ends))})" if len(row.samples) > 1 else ""
            others = [_number(row.columns[c]) if c in row.columns else "–" for c in columns]
            table.add_row(Text(row.name), value, spread, *others, Text(row.note))
        return as_text(table, _WIDTH)


@dataclass
class Report:
    """What was measured, on what and how (``facts``); ``sections`` grow with time."""

    name: str
    facts: dict[str, Any]
    sections: list[Section] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return any(section.failed for section in self.sections)

    def row(self, key: str, context: int | None = None) -> Row | None:
        """None where it was not measured."""
        rows = (row for s in self.sections if s.context == context for row in s.rows)
        return next((row for row in rows if row.key == key), None)

    def heading(self) -> str:
        """The facts, as they are printed."""
        return as_text("; ".join(f"{name}: {fact}" for name, fact in self.facts.items()), _WIDTH)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        sections = [
            asdict(section) | {"rows": [asdict(r) | {"median": r.median} for r in section.rows]}
            for section in self.sections
        ]
        return {**self.facts, "sections": sections, "seconds": self.seconds}

    def save(self, path: Path) -> None:
        """Write JSON to ``path`` (a folder holds ``NAME.json``), and what is printed beside it."""
        path = path if path.suffix == ".json" else path / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        texts = [self.heading(), *(section.text() for section in self.sections)]
        path.with_suffix(".txt").write_text("\n".join(texts) + "\n", encoding="utf-8")

    def plot(self, path: Path) -> None:
        """Draw bars and their range, a panel a section and unit; a token's time in one for all.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        panels: dict[str, dict[str, list[float]]] = {}
        for section in self.sections:
            for row in section.rows:
                if row.samples and row.unit in _DRAWN:
                    shared = f"decoding, {section.context or 0:,} tokens"
                    title = shared if row.unit == "ms/token" else section.title
                    panels.setdefault(f"{title}: {row.unit}", {})[row.name] = row.samples
        draw_bars(path, panels)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if value else "0"
