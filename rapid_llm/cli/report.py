"""``rapid-llm report``: tables of runs, missing methods, and the paper's figures."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from rich.box import MARKDOWN, SIMPLE_HEAD, Box
from rich.table import Table
from typer import Argument, Option

from rapid_llm.cli.app import app
from rapid_llm.console import as_text, number_table
from rapid_llm.errors import DataError, MissingDependencyError
from rapid_llm.evaluation.methods import METHODS
from rapid_llm.folders import packaged_text

REPEATED = (
    "model", "drafter", "layers", "data", "context_tokens", "gamma", "mode", "retrieval_tokens",
    "chunk_tokens", "retriever", "embedder", "seed", "dtype", "device", "drafter_device",
    "device_map", "drafter_device_map",
    "attn_implementation", "drafter_quantization", "kv_cache_bytes", "max_sequences",
    "judge_url", "judge_model",
)  # fmt: skip
"""Settings that are options of ``rapid-llm eval``; a run is resumed with the same values only."""

_PACKAGES = ("openai", "pydantic", "rouge_score", "scipy", "sklearn")
_WIDTH = 1000  # of report.md's tables, whose cells have a line each


@app.command()
def report(
    folders: Annotated[
        list[Path],
        Argument(
            metavar="FOLDER",
            help="Folders that rapid-llm eval wrote, or a folder of such folders.",
        ),
    ],
    out: Annotated[Path | None, Option(help="Folder to write; by default the first one.")] = None,
) -> None:
    """Write report.md on runs of rapid-llm eval: tables, missing methods, the paper's figures."""
    require_packages("report")
    print(write_report(folders, out or folders[0]))


def require_packages(command: str) -> None:
    """Raises MissingDependencyError where a package of the extra is not installed."""
    if missing := [package for package in _PACKAGES if find_spec(package) is None]:
        raise MissingDependencyError(
            f"rapid-llm {command} needs {', '.join(missing)}, which is not installed: use "
            'pip install "rapid-llm[eval]"'
        )


def tables(rows: Sequence[Mapping[str, Any]], box: Box = SIMPLE_HEAD) -> tuple[Table, Table]:
    """Tables of scores (percent, difference to ``lc``) and of speed, with a row per method."""
    metrics = list(rows[0]["scores"]) if rows else []
    scored = "items", *metrics, f"{metrics[0] if metrics else ''} − lc"
    timed = "tokens/s", "÷ lc", "accepted", "a", "tokens a round", "retrieved", "fell back"
    scores, speeds = (number_table("method", others, box=box) for others in (scored, timed))
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


def untimed(rows: Sequence[Mapping[str, Any]]) -> str:
    """Why a run has no speeds; empty where each answer was decoded alone."""
    most = max((row["at_once"] for row in rows), default=1)
    if most == 1:
        return ""
    return (
        f"Up to {most} answers were decoded at once, so that no method has a speed of its own: "
        "with --max-sequences 1, in another folder, they are timed."
    )


def write_report(folders: Iterable[Path], out: Path) -> Path:
    """Write ``report.md`` on the runs in these folders, or in those directly below them.

    Raises DataError if a folder holds no run, or one that is damaged or has no answer.
    """
    from rapid_llm.evaluation.journal import RESULTS, Record, read_run
    from rapid_llm.evaluation.summary import summarize

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
        parts += filter(None, [untimed(rows)])
        missing += _missing(folder, settings, rows)
    parts += ["## What is missing", "\n".join(missing) or "Nothing."]
    parts += [packaged_text("report.md")]
    out.mkdir(parents=True, exist_ok=True)
    texts = [part if isinstance(part, str) else as_text(part, _WIDTH).strip() for part in parts]
    (out / "report.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return out / "report.md"


def _missing(
    folder: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Lines on what a run lacks, each with the command that adds it."""
    most = max(row["items"] for row in rows)
    own = {name: settings.get(name) for name in REPEATED} | {"limit": most, "out": folder}
    repeated = " ".join(
        f"--{name.replace('_', '-')} "
        + shlex.quote(json.dumps(value) if isinstance(value, dict) else str(value))
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


def _percent(interval: Mapping[str, float | None] | None, sign: str = "") -> str:
    """An interval in percent, such as ``42.8 (38.1, 47.6)``, without unknown bounds."""
    if interval is None:
        return "–"
    value, low, high = (None if x is None else f"{100 * x:{sign}.1f}" for x in interval.values())
    return str(value) if low is None else f"{value} ({low}, {high})"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
