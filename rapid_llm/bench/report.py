"""The bench's results for people: tables and a chart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.table import Table

from rapid_llm.bench.measure import VERIFIED, Cell, Costs, Engine, Report, Row
from rapid_llm.figure import new_figure

GENERATE = "transformers generate"


def heading(report: Report) -> str:
    load = ", ".join(f"{load:.2f}" for load in report.load_average) or "unknown"
    return (
        f"{report.model}, {report.dtype}, {report.device}, {report.threads} threads; "
        f"{report.new_tokens} new tokens, greedy, medians of {report.repeats} interleaved runs; "
        f"memory is read at {report.read_bandwidth / 1e9:.0f} GB/s; load average before, after: "
        f"{load}; torch {report.torch}, transformers {report.transformers}"
    )


def cell_table(cell: Cell) -> Table:
    """A row a method; c and v are of this cell's own plain step."""
    table = Table(
        title=f"{cell.task}: {cell.target_tokens:,} tokens, {cell.draft_tokens} for the drafter",
        box=SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("method")
    for name in ("tokens/s", "(range)", "÷ lc", "÷ generate", "a", "E", "c", "v", "γ"):
        table.add_column(name, justify="right")
    for row in cell.rows.values():
        low, high = 1000 / max(row.ms_per_token), 1000 / min(row.ms_per_token)
        table.add_row(
            row.method,
            f"{1000 / row.ms:.1f}",
            f"{low:.1f}–{high:.1f}",
            _number(cell.ratio(row.method, "lc")),
            _number(cell.ratio(row.method, GENERATE)),
            *_speculation(row, cell),
        )
    return table


def _speculation(row: Row, cell: Cell) -> Iterator[str]:
    stats = row.stats
    if stats is None or stats.drafted_tokens == 0 or "lc" not in cell.rows:
        yield from "–––––"
        return
    costs = Costs.of(stats, cell.rows["lc"].ms / 1000)
    yield f"{stats.acceptance_rate:.2f}"
    yield f"{stats.tokens_per_round:.1f}"
    yield _number(costs.c)
    yield f"{costs.v:.2f}"
    yield f"{costs.gamma:.1f}"


def engine_lines(report: Report) -> Iterator[str]:
    """What does not depend on the answer, a line each."""
    for engine in report.engines:
        step = median(engine.step)
        share = engine.bytes_read / report.read_bandwidth / step
        yield (
            f"{engine.context:,} tokens: a plain step {1000 * step:.1f} ms "
            f"({share:.0%} of the memory limit: {engine.bytes_read / 1e6:.0f} MB), verification "
            f"of {VERIFIED} ÷ step {median(engine.verification) / step:.2f}"
        )
        yield from _prefill(report, engine)
        first, second = median(engine.first_question), median(engine.second_question)
        yield (
            f"  time to the first token: {first:.2f} s on a new document, {second:.2f} s for the "
            f"next question on it ({second / first:.1%})"
        )
        for name, predicted in engine.predicted.items():
            task, method = name.split(": ")
            cell = next(c for c in report.cells if (c.task, c.context) == (task, engine.context))
            measured = _number(cell.ratio(method, "lc"))
            yield f"  plan, {name}: ÷ lc predicted {predicted:.2f}, measured {measured}"


def _prefill(report: Report, engine: Engine) -> Iterator[str]:
    cells = [cell for cell in report.cells if cell.context == engine.context]
    ours = [s for cell in cells if "lc" in cell.rows for s in cell.rows["lc"].prefill]
    theirs = [s for cell in cells if GENERATE in cell.rows for s in cell.rows[GENERATE].prefill]
    if ours and theirs:
        ratio = median(ours) / median(theirs)
        yield (
            f"  first prefill: {median(ours):.2f} s ({min(ours):.2f}–{max(ours):.2f}), "
            f"transformers' {median(theirs):.2f} s ({min(theirs):.2f}–{max(theirs):.2f}): "
            f"{ratio:.2f}"
        )


def plot(report: Report, path: Path) -> None:
    """A bar chart: tokens a second of every method, a panel a cell; bars show the range.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    cells = report.cells
    most = max(len(cell.rows) for cell in cells)
    figure = new_figure("--plot needs", 9, len(cells) * (0.9 + 0.22 * most))
    for index, cell in enumerate(cells):
        axes = figure.add_subplot(len(cells), 1, index + 1)
        names = list(cell.rows)[::-1]
        rows = [cell.rows[name] for name in names]
        speeds = [1000 / row.ms for row in rows]
        below = [s - 1000 / max(row.ms_per_token) for s, row in zip(speeds, rows, strict=True)]
        above = [1000 / min(row.ms_per_token) - s for s, row in zip(speeds, rows, strict=True)]
        bars = axes.barh(names, speeds, xerr=[below, above], color="#4878a8", ecolor="#999999")
        axes.bar_label(bars, fmt="%.0f", padding=6, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{cell.task}, {cell.target_tokens:,} tokens", loc="left", fontsize=10)
    axes.set_xlabel(f"tokens a second ({report.model}, {report.dtype}, {report.device})")
    figure.savefig(path, dpi=150)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
