"""The parts of a report: tables and a figure each, or None where a run has no data for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rapid_llm.evaluation import intervals, plots
from rapid_llm.evaluation.intervals import Interval
from rapid_llm.evaluation.markdown import NONE, change, estimate, number, percent, table
from rapid_llm.evaluation.plots import Bar, Line, Panel
from rapid_llm.evaluation.runs import Run
from rapid_llm.evaluation.summary import BASELINE, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_JUDGED = 10
"""A position of drafts at which fewer tokens were judged says nothing, and is left out."""

_UNKNOWN = float("nan")


@dataclass(frozen=True)
class Section:
    """Markdown, and the figure that goes below it."""

    text: str
    figure: Figure


def quality_and_speed(run: Run) -> Section:
    """Every method: scores, the difference to ``lc`` and the speed; also by group of items."""
    rows = run.summary.rows
    scores = [
        (f"{metric}, %", lambda row, metric=metric: estimate(row.scores[metric]))
        for metric in run.settings["metrics"]
    ]
    everything = table(
        rows,
        ("method", lambda row: row.method),
        ("items", lambda row: str(row.items)),
        *scores,
        (f"{run.headline} − lc", lambda row: change(row.difference)),
        ("tokens/s", lambda row: number(row.tokens_per_second, 1)),
        ("÷ lc", lambda row: number(row.speedup, 2)),
        ("accepted, %", lambda row: percent(row.acceptance_ratio)),
        ("a", lambda row: number(row.acceptance_rate, 2)),
        ("tokens a round", lambda row: number(row.tokens_per_round, 1)),
        ("retrieved, %", lambda row: percent(row.retrieved)),
        ("fell back", lambda row: str(row.fell_back)),
    )
    groups = [_by_group(name, values, run.headline) for name, values in run.summary.groups.items()]
    return Section("\n\n".join([everything, *groups]), _compared(run, rows, "Quality and speed"))


def eta_sweep(run: Run) -> Section | None:
    """Score and acceptance over η; a line for relevant retrieval, one for irrelevant."""
    sweeps = _sweeps(run.summary.rows)
    if not sweeps:
        return None
    accepted = {row.method: _acceptance(run, row) for rows in sweeps.values() for row in rows}
    text = table(
        [(label, row) for label, rows in sweeps.items() for row in rows],
        ("retrieval", lambda point: point[0]),
        ("η", lambda point: f"{point[1].options['eta']:g}"),
        (f"{run.headline}, %", lambda point: estimate(point[1].scores[run.headline])),
        (f"{run.headline} − lc", lambda point: change(point[1].difference)),
        ("accepted, %", lambda point: estimate(accepted[point[1].method])),
        ("÷ lc", lambda point: number(point[1].speedup, 2)),
    )

    def lines(values: Mapping[str, Interval | None]) -> list[Line]:
        return [
            Line(
                f"{label} retrieval",
                [
                    (row.options["eta"], _hundred(value))
                    for row in rows
                    if (value := values[row.method]) is not None
                ],
            )
            for label, rows in sweeps.items()
        ]

    scores = {row.method: row.scores[run.headline] for row in run.summary.rows}
    figure = plots.lines(
        [
            (Panel(f"{run.headline}, %", _reference(run)), lines(scores)),
            (Panel("accepted ÷ drafted tokens, %"), lines(accepted)),
        ],
        "η, strength of the knowledge transfer",
        f"Knowledge transfer: {run.title}",
    )
    return Section(text, figure)


def context_length(runs: Sequence[Run]) -> Section | None:
    """What was run at several lengths of one task, by the same models."""
    headline = runs[0].headline
    points: dict[str, list[tuple[int, Row]]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.prompt_tokens):
        for row in run.summary.rows:
            if _relevant(row):
                points[row.method].append((run.prompt_tokens, row))
    points = {method: own for method, own in points.items() if len(own) > 1}
    if not points:
        return None
    text = table(
        [(method, *point) for method, own in points.items() for point in own],
        ("method", lambda point: point[0]),
        ("target reads, tokens", lambda point: f"{point[1]:,}"),
        (f"{headline}, %", lambda point: estimate(point[2].scores[headline])),
        (f"{headline} − lc", lambda point: change(point[2].difference)),
        ("tokens/s", lambda point: number(point[2].tokens_per_second, 1)),
        ("÷ lc", lambda point: number(point[2].speedup, 2)),
    )
    scores = [
        Line(method, [(tokens, _hundred(row.scores[headline])) for tokens, row in own])
        for method, own in points.items()
    ]
    speedups = [
        Line(method, timed)
        for method, own in points.items()
        if (timed := [(at, _exact(row.speedup)) for at, row in own if row.speedup is not None])
    ]
    panels = [(Panel(f"{headline}, %"), scores)]
    if speedups:
        panels.append((Panel("tokens/s ÷ lc's", ("as fast as lc", _exact(1))), speedups))
    figure = plots.lines(
        panels,
        "tokens that the target reads",
        f"Context length: {runs[0].title}",
        logarithmic=True,
    )
    pays = "\n".join(f"- {_pays(line)}" for line in speedups if line.label.startswith("rapid"))
    return Section(f"{text}\n\n{pays}".rstrip(), figure)


def positions(run: Run) -> Section | None:
    """How often the 1st, 2nd, … token of a draft is kept, once those before it were."""
    counts = {
        row.method: [(judged, kept) for judged, kept in row.accepted_at if judged >= LEAST_JUDGED]
        for row in run.summary.rows
        if _relevant(row)
    }
    rates = {
        method: [(n, _hundred(intervals.rate([1] * k + [0] * (n - k)))) for n, k in some]
        for method, some in counts.items()
        if some
    }
    if not rates:
        return None
    text = table(
        rates.items(),
        ("accepted ÷ judged, %", lambda method: method[0]),
        *(
            (
                str(at + 1),
                lambda method, at=at: (
                    f"{method[1][at][1].value:.0f} ({method[1][at][0]})"
                    if at < len(method[1])
                    else NONE
                ),
            )
            for at in range(max(map(len, rates.values())))
        ),
    )
    figure = plots.lines(
        [
            (
                Panel("accepted ÷ judged tokens, %"),
                [
                    Line(method, [(at, rate) for at, (_, rate) in enumerate(some, start=1)])
                    for method, some in rates.items()
                ],
            )
        ],
        "position in the draft, tokens",
        f"Acceptance by position: {run.title}",
    )
    return Section(text, figure)


def dynamic_eta(run: Run) -> Section | None:
    """η that follows the retrieval's confidence and the position, beside constant η."""
    rows = [row for row in run.summary.rows if row.base == "rapid"]
    if not any(map(_dynamic, rows)):
        return None
    text = table(
        rows,
        ("method", lambda row: row.method),
        ("η is", lambda row: "dynamic" if _dynamic(row) else "constant"),
        (f"{run.headline}, %", lambda row: estimate(row.scores[run.headline])),
        (f"{run.headline} − lc", lambda row: change(row.difference)),
        ("tokens/s", lambda row: number(row.tokens_per_second, 1)),
        ("÷ lc", lambda row: number(row.speedup, 2)),
        ("accepted, %", lambda row: percent(row.acceptance_ratio)),
    )
    return Section(text, _compared(run, rows, "Dynamic and constant η"))


def _compared(run: Run, rows: Sequence[Row], title: str) -> Figure:
    quality = [Bar(row.method, _hundred(row.scores[run.headline])) for row in rows]
    speed = [
        Bar(
            row.method,
            _exact(row.tokens_per_second),
            "" if row.speedup is None else f"{row.speedup:.2f} × lc",
        )
        for row in rows
        if row.tokens_per_second is not None
    ]
    panels = [(Panel(f"{run.headline}, %", _reference(run)), quality)]
    if speed:
        panels.append((Panel("decoding, tokens/s"), speed))
    return plots.bars(panels, f"{title}: {run.title}")


def _by_group(name: str, values: Mapping[str, Sequence[Row]], headline: str) -> str:
    found = {value: {row.method: row for row in rows} for value, rows in values.items()}

    def cell(method: str, value: str) -> str:
        row = found[value].get(method)
        return NONE if row is None else f"{estimate(row.scores[headline])}, n = {row.items}"

    return table(
        dict.fromkeys(method for rows in found.values() for method in rows),
        (f"{headline}, %, by {name}", str),
        *((value, lambda method, value=value: cell(method, value)) for value in found),
    )


def _sweeps(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By the retrieval's name: rows that differ in η only, in its order; several of them."""
    found: dict[tuple[bool, frozenset[str]], dict[float, Row]] = defaultdict(dict)
    for row in rows:
        if row.base == "rapid" and not _dynamic(row):
            found[_relevant(row), _others(row, "eta")][row.options["eta"]] = row
    for row in (row for row in rows if row.base == "sd"):  # η = 0, whatever the mode
        for (relevant, others), own in found.items():
            if _relevant(row) == relevant and _others(row, "eta", "mode") <= others:
                own[row.options["eta"]] = row
    sweeps = {key: own for key, own in found.items() if len(own) > 1}
    shared = frozenset.intersection(*(others for _, others in sweeps)) if sweeps else frozenset()
    return {
        ", ".join(["relevant" if relevant else "irrelevant", *sorted(others - shared)]): [
            own[eta] for eta in sorted(own)
        ]
        for (relevant, others), own in sweeps.items()
    }


def _others(row: Row, *left_out: str) -> frozenset[str]:
    """The options but for these, such as ``gamma=4``."""
    return frozenset(
        f"{name}={value}"
        for name, value in row.options.items()
        if name not in ("irrelevant", *left_out)
    )


def _acceptance(run: Run, row: Row) -> Interval | None:
    ratios = [
        record.stats["accepted_tokens"] / record.stats["drafted_tokens"]
        for record in run.records
        if record.method == row.method and record.stats.get("drafted_tokens")
    ]
    return intervals.mean(ratios) if ratios else None


def _pays(line: Line) -> str:
    """From which length on a method is faster than ``lc``, at all lengths that were run."""
    slower = [tokens for tokens, speedup in line.points if speedup.value <= 1]
    faster = [tokens for tokens, _ in line.points if tokens > max(slower, default=0)]
    if not faster:
        return f"`{line.label}` is not faster than `{BASELINE}` at the longest context."
    return f"`{line.label}` is faster than `{BASELINE}` from {faster[0]:,} tokens on."


def _reference(run: Run) -> tuple[str, Interval] | None:
    row = run.baseline
    return None if row is None else (BASELINE, _hundred(row.scores[run.headline]))


def _relevant(row: Row) -> bool:
    return not row.options.get("irrelevant")


def _dynamic(row: Row) -> bool:
    return bool(row.options.get("dynamic_eta"))


def _hundred(value: Interval) -> Interval:
    return Interval(*(100 * part for part in value))


def _exact(value: float) -> Interval:
    """A number whose interval is not known."""
    return Interval(value, _UNKNOWN, _UNKNOWN)
