"""What a bench measured: rows in sections, shown as tables, saved as JSON, drawn as bars."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rapid_llm.figure import new_figure

_WIDTH = 132
_DRAWN = ("tokens/s", "ms/token", "ms")


@dataclass(frozen=True)
class Row:
    """A quantity.

    Attributes:
        samples: one number a counted run; empty where nothing could be measured.
        note: what a number alone would not say.
        simulated: whether a coin decided what was accepted.
        columns: further figures of the same thing, by their heading.
    """

    key: str
    label: str
    unit: str
    samples: list[float]
    note: str = ""
    simulated: bool = False
    columns: dict[str, float] = field(default_factory=dict)

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
    """What belongs together, at a context length or (None) at any.

    Attributes:
        failed: why there are not all rows; None where there are.
        seconds: that measuring took.
    """

    name: str
    context: int | None
    rows: list[Row]
    failed: str | None
    seconds: float

    @property
    def title(self) -> str:
        return self.name if self.context is None else f"{self.name}, {self.context:,} tokens"

    def text(self) -> str:
        """A table, a line a row, with what failed below."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row.columns))
        table = Table(
            title=f"{self.title} ({self.seconds:.0f} s)",
            box=SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
            caption=f"failed: {self.failed}" if self.failed else None,
            show_header=bool(columns),
        )
        table.add_column(no_wrap=True)
        for name in ("", "", *columns):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("")
        for row in self.rows:
            value = "–" if row.median is None else f"{_number(row.median)} {row.unit}".rstrip()
            ends = min(row.samples, default=0), max(row.samples, default=0)
            spread = f"({'–'.join(map(_number, ends))})" if len(row.samples) > 1 else ""
            others = [_number(row.columns[c]) if c in row.columns else "–" for c in columns]
            table.add_row(Text(row.name), value, spread, *others, Text(row.note))
        return as_text(table)


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
        return as_text("; ".join(f"{name}: {fact}" for name, fact in self.facts.items()))

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
        panels: dict[str, list[Row]] = {}
        for section in self.sections:
            for row in section.rows:
                if row.samples and row.unit in _DRAWN:
                    shared = f"decoding, {section.context or 0:,} tokens"
                    title = shared if row.unit == "ms/token" else section.title
                    panels.setdefault(f"{title}: {row.unit}", []).append(row)
        heights = [len(rows) + 2 for rows in panels.values()] or [2]
        figure = new_figure("--plot needs", 9, 0.3 * sum(heights))
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        for index, (title, rows) in enumerate(panels.items()):
            axes = figure.add_subplot(grid[index])
            middle = [median(row.samples) for row in rows]
            ends = [(min(row.samples), max(row.samples)) for row in rows]
            reach = [(m - a, b - m) for m, (a, b) in zip(middle, ends, strict=True)]
            names = [row.name for row in rows]
            bars = axes.barh(
                names,
                middle,
                xerr=list(zip(*reach, strict=True)),
                color="#4878a8",
                ecolor="#999999",
            )
            axes.bar_label(bars, fmt="%.3g", padding=6, fontsize=8)
            axes.invert_yaxis()
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(title, loc="left", fontsize=10)
        figure.savefig(path, dpi=150)


def as_text(what: str | Table) -> str:
    """As it is printed and saved."""
    file = StringIO()
    Console(file=file, width=_WIDTH, markup=False, highlight=False).print(what)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if value else "0"
