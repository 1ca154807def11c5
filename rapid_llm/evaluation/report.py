"""Tables of a run's summary, and ``report.md``: these, what is missing, and the paper's own."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN, SIMPLE_HEAD, Box
from rich.console import Console
from rich.table import Table

from rapid_llm.errors import DataError
from rapid_llm.evaluation.journal import RESULTS, SETTINGS, Record, read_records, read_settings
from rapid_llm.evaluation.methods import METHODS
from rapid_llm.evaluation.summary import BASELINE, summarize

REPEATED = (
    "model", "drafter", "layers", "data", "context_tokens", "gamma", "mode", "retrieval_tokens",
    "chunk_tokens", "retriever", "embedder", "seed", "dtype", "device", "drafter_device",
    "judge_url", "judge_model",
)  # fmt: skip
"""The settings that are options of ``rapid-llm eval``: a run goes on with the same ones only."""


def tables(rows: Sequence[Mapping[str, Any]], box: Box = SIMPLE_HEAD) -> tuple[Table, Table]:
    """A row a method: its scores in percent and the difference to ``lc``; its speed."""
    metrics = list(rows[0]["scores"]) if rows else []
    change = f"{metrics[0] if metrics else ''} − {BASELINE}"
    scores = _table(box, "method", "items", *metrics, change)
    speeds = _table(
        box, "method", "tokens/s", f"÷ {BASELINE}", "accepted", "a", "tokens a round", "retrieved",
        "fell back",
    )  # fmt: skip
    for row in rows:
        values = [_percent(row["scores"][name]) for name in metrics]
        scores.add_row(row["method"], str(row["items"]), *values, _percent(row["difference"], "+"))
        speeds.add_row(
            row["method"],
            _number(row["tokens_per_second"], 1),
            *(_number(row[name], 2) for name in ("speedup", "acceptance_ratio", "acceptance_rate")),
            _number(row["tokens_per_round"], 1),
            _number(row["retrieved"], 2),
            str(row["fell_back"]),
        )
    return scores, speeds


def write_report(folders: Iterable[Path], out: Path) -> Path:
    """Write ``report.md`` on the runs in these folders, or in those directly below them.

    Raises DataError if a folder holds no run, or one that is damaged or has no answer.
    """
    runs: dict[Path, tuple[dict[str, Any], list[Record]]] = {}
    for folder in folders:
        below = sorted(path.parent for path in folder.glob(f"*/{RESULTS}"))
        found = [folder] if (folder / RESULTS).exists() else below
        if not found:
            raise DataError(
                f"{folder} holds no {RESULTS}, nor does a folder directly below it: give a folder "
                "that 'rapid-llm eval --out' wrote"
            )
        runs |= {one: read_run(one) for one in found}
    parts: list[str | Table] = ["# Evaluation"]
    missing: list[str] = []
    for folder, (settings, records) in runs.items():
        rows = summarize(records, settings["metrics"])["rows"]
        known = {name: settings.get(name) for name in ("task", *REPEATED)}
        shown = ", ".join(f"`{name}={value}`" for name, value in known.items() if value is not None)
        parts += [f"## {folder.resolve().name}", shown, *tables(rows, MARKDOWN)]
        missing += _missing(folder, settings, rows)
    parts += ["## What is missing", "\n".join(missing) or "Nothing."]
    parts += [(resources.files("rapid_llm") / "data" / "report.md").read_text("utf-8")]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "report.md").open("w", encoding="utf-8") as file:
        console = Console(file=file, width=1000, color_system=None, markup=False, highlight=False)
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str), end="\n\n")
    return out / "report.md"


def read_run(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """The settings and the answers of a run; DataError if they are damaged or there is none."""
    settings, records = read_settings(folder), read_records(folder)
    metrics = settings.get("metrics")
    if not isinstance(metrics, dict) or not metrics:
        raise DataError(f"{folder / SETTINGS} has no 'metrics', the task's: restore the file")
    if not records:
        raise DataError(f"{folder / RESULTS} holds no answer yet: run 'rapid-llm eval' first")
    for record in records:
        for name in metrics.keys() - record.scores.keys():
            raise DataError(
                f"{folder / RESULTS}: item {record.item!r} of method {record.method!r} has no "
                f"score {name!r}: remove its line and run 'rapid-llm eval' again"
            )
    return settings, records


def _missing(
    folder: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """A line each, with the command that brings it."""
    most = max(row["items"] for row in rows)
    own = {name: settings.get(name) for name in REPEATED} | {"limit": most, "out": folder}
    repeated = " ".join(
        f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
        for name, value in own.items()
        if value is not None
    )
    lacking = [
        (f"`{row['method']}` answered {row['items']} of {most} items", f"--method {row['base']}")
        for row in rows
        if row["items"] < most
    ]
    run = {row["base"] for row in rows}
    lacking += [(f"`{one}`", f"--method {one}") for one in METHODS if one not in run]
    for option, what in (("irrelevant", "irrelevant retrieval"), ("dynamic_eta", "dynamic η")):
        if not any(row["options"].get(option) for row in rows):
            lacking.append((what, f"--method rapid --{option.replace('_', '-')}"))
    for what, options in lacking:
        task = settings["task"]
        yield f"- {folder.resolve().name}: {what}. `rapid-llm eval {task} {options} {repeated}`"


def _table(box: Box, first: str, *others: str) -> Table:
    table = Table(box=box)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _percent(interval: Mapping[str, float | None] | None, sign: str = "") -> str:
    """With the bounds where they are known: ``42.8 (38.1, 47.6)``."""
    if interval is None:
        return "–"
    value, low, high = (None if x is None else f"{100 * x:{sign}.1f}" for x in interval.values())
    return str(value) if low is None else f"{value} ({low}, {high})"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
