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
    """A measured quantity.

    Attributes:
        key: name of the quantity in JSON.
        label: name of the quantity in tables.
        unit: unit of the samples.
        samples: a value for each counted run; empty where nothing could be measured.
        note: remark on the measurement.
        simulated: whether acceptance was simulated.
        columns: further numbers by heading.
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
        """Median of the samples; None without samples."""
        return median(self.samples) if self.samples else None

    @property
    def name(self) -> str:
        """The label, marked with ``*`` if the row is simulated."""
        return f"{self.label} *" if self.simulated else self.label


@dataclass(frozen=True)
class Section:
    """The rows of one step of a bench.

    Attributes:
        name: name of the step.
        context: context length in tokens; None where it does not matter.
        rows: the rows.
        failed: reason why rows are missing; None if the step succeeded.
        seconds: duration of the step.
    """

    name: str
    context: int | None
    rows: list[Row]
    failed: str | None
    seconds: float

    @property
    def title(self) -> str:
        """Name and context length."""
        return self.name if self.context is None else f"{self.name}, {self.context:,} tokens"

    def text(self) -> str:
        """The rows as a table, followed by the failure if there was one."""
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
    """Results of a bench.

    Attributes:
        name: name of the model or shape.
        facts: facts about model, machine and method, by name.
        sections: sections of the finished steps.
        seconds: duration so far.
    """

    name: str
    facts: dict[str, Any]
    sections: list[Section] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether any step failed."""
        return any(section.failed for section in self.sections)

    def row(self, key: str, context: int | None = None) -> Row | None:
        """The row of a key and context length; None where it was not measured."""
        rows = (row for s in self.sections if s.context == context for row in s.rows)
        return next((row for row in rows if row.key == key), None)

    def heading(self) -> str:
        """The facts, in one line."""
        return as_text("; ".join(f"{name}: {fact}" for name, fact in self.facts.items()), _WIDTH)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        sections = [
            asdict(section) | {"rows": [asdict(r) | {"median": r.median} for r in section.rows]}
            for section in self.sections
        ]
        return {**self.facts, "sections": sections, "seconds": self.seconds}

    def save(self, path: Path) -> None:
        """Write the results as JSON, and as printed text next to it.

        Args:
            path: file ``*.json``, or folder for ``NAME.json``.
        """
        path = path if path.suffix == ".json" else path / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        texts = [self.heading(), *(section.text() for section in self.sections)]
        path.with_suffix(".txt").write_text("\n".join(texts) + "\n", encoding="utf-8")

    def plot(self, path: Path) -> None:
        """Draw a bar chart with a panel per section and unit, and one for all times per token.

        Args:
            path: image file to write.

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
