"""The results of ``rapid-llm bench --shape`` for people: a table a section, and a chart."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rapid_llm.bench.shape_bench import PASSES, SIMULATED, Row, Section, ShapeReport
from rapid_llm.figure import new_figure

_NEEDS = "--plot needs"


def heading(report: ShapeReport) -> str:
    return (
        f"{report.shape}: {report.parameters / 1e9:.2f} billion random weights, {report.dtype}, "
        f"{report.device}; torch {report.torch}, transformers {report.transformers}; KV made up, "
        f"{report.draft_tokens:,} tokens for the drafter, temperature 1; medians, in parentheses "
        f"the range. Rows marked * have their {SIMULATED}: the weights are random, and so would "
        "be what they accept."
    )


def section_table(section: Section) -> Table:
    """A row a quantity; what failed is the caption."""
    where = "" if section.context is None else f", {section.context:,} tokens"
    table = Table(
        title=f"{section.name}{where} ({section.seconds:.0f} s)",
        box=SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for row in section.rows:
        mark = " *" if row.simulated else ""
        table.add_row(Text(row.label + mark), _value(row), _range(row), Text(row.note))
    if section.failed:
        table.caption = Text(f"failed: {section.failed}", style="bold")
    return table


def _value(row: Row) -> str:
    return "–" if row.median is None else f"{_number(row.median)} {row.unit}".rstrip()


def _range(row: Row) -> str:
    if len(row.samples) < 2:
        return ""
    return f"({_number(min(row.samples))}–{_number(max(row.samples))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if value else "0"


def require_plots() -> None:
    """Raises MissingDependencyError where matplotlib is not installed."""
    new_figure(_NEEDS, 1, 1)


def plot(report: ShapeReport, path: Path) -> None:
    """Milliseconds a token by method, and a pass by its tokens; a row of panels a context.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    contexts = list(dict.fromkeys(s.context for s in report.sections if s.context is not None))
    figure = new_figure(_NEEDS, 9, 0.8 + 2.6 * len(contexts))
    for index, context in enumerate(contexts):
        bars = _per_token(report, context)
        left = figure.add_subplot(len(contexts), 2, 2 * index + 1)
        drawn = left.barh(list(bars)[::-1], list(bars.values())[::-1], color="#4878a8")
        left.bar_label(drawn, fmt="%.3g", padding=4, fontsize=8)
        left.set_title(f"{context:,} tokens", loc="left", fontsize=10)
        left.set_xlabel("ms a token (* acceptance by a coin)", fontsize=8)
        right = figure.add_subplot(len(contexts), 2, 2 * index + 2)
        passes = {
            n: row.median
            for n in PASSES
            if (row := report.row(f"pass_{n}", context)) and row.median is not None
        }
        right.plot(list(passes), list(passes.values()), marker="o", color="#4878a8")
        limit = report.row("limit", context)
        if limit is not None and limit.median is not None:
            right.axhline(limit.median, color="#999999", linestyle="--", label="memory limit")
            right.legend(fontsize=8, frameon=False)
        right.set_ylim(bottom=0)
        right.set_xlabel("tokens of a pass", fontsize=8)
        right.set_ylabel("ms", fontsize=8)
        for axes in (left, right):
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report.shape}, {report.dtype}, {report.device}", fontsize=10)
    figure.savefig(path, dpi=150)


def _per_token(report: ShapeReport, context: int) -> dict[str, float]:
    named = {"limit": "memory limit", "plain": "plain", "generate": "transformers generate",
             "static": "generate, static cache"}  # fmt: skip
    bars = {
        label: row.median
        for key, label in named.items()
        if (row := report.row(key, context)) and row.median is not None
    }
    plain = bars.get("plain")
    for section in report.sections:
        for row in section.rows if section.context == context else []:
            if plain and row.key.endswith("_speedup") and row.median:
                bars[f"{row.label.replace(' ÷ plain', '')} *"] = plain / row.median
    return bars
