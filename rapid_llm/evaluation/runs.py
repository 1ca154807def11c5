"""A run: what one folder that ``rapid-llm eval`` wrote holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from rapid_llm.errors import DocumentError
from rapid_llm.evaluation.records import (
    RESULTS,
    SETTINGS,
    Record,
    read_records,
    read_settings,
)
from rapid_llm.evaluation.summary import BASELINE, Row, Summary, summarize

_MODELS = ("model", "drafter", "layers")


@dataclass(frozen=True)
class Run:
    """The answers of one folder, with their settings."""

    folder: Path
    settings: Mapping[str, Any]
    records: Sequence[Record]

    @cached_property
    def summary(self) -> Summary:
        return summarize(self.records, self.settings["metrics"])

    @property
    def task(self) -> str:
        return self.records[0].task

    @property
    def headline(self) -> str:
        """The metric that methods are compared by."""
        return next(iter(self.settings["metrics"]))

    @property
    def model(self) -> str:
        """Target, drafter and layers: runs that differ in them are not to be compared."""
        known = {name: self.settings.get(name) for name in _MODELS}
        return ", ".join(f"{name} {value}" for name, value in known.items() if value)

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.task, self.model)))

    @property
    def prompt_tokens(self) -> int:
        """What the target read: the median over items, of ``lc`` where it was run; else 0."""
        read = [record for record in self.records if record.stats.get("prompt_tokens")]
        plain = [record for record in read if record.base == BASELINE]
        tokens = [record.stats["prompt_tokens"] for record in plain or read]
        return round(median(tokens)) if tokens else 0

    @property
    def baseline(self) -> Row | None:
        return next((row for row in self.summary.rows if row.method == BASELINE), None)


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """The runs in these folders, or in the folders directly below them.

    Raises:
        DocumentError: a folder holds no run, or one whose files are damaged or hold no answer.
    """
    runs = []
    for folder in folders:
        below = sorted(path.parent for path in folder.glob(f"*/{RESULTS}"))
        inside = [folder] if (folder / RESULTS).exists() else below
        if not inside:
            raise DocumentError(
                f"{folder} holds no {RESULTS}, nor does a folder directly below it: give a folder "
                "that 'rapid-llm eval --out' wrote"
            )
        runs += [_read_run(one) for one in inside]
    return runs


def _read_run(folder: Path) -> Run:
    settings, records = read_settings(folder), read_records(folder)
    metrics = settings.get("metrics")
    if not isinstance(metrics, dict) or not metrics:
        raise DocumentError(
            f"{folder / SETTINGS}: field 'metrics' is {metrics!r}, not the task's metrics: "
            "restore the file"
        )
    if not records:
        raise DocumentError(f"{folder / RESULTS} holds no answer yet: run 'rapid-llm eval' first")
    for record in records:
        for name in metrics.keys() - record.scores.keys():
            raise DocumentError(
                f"{folder / RESULTS}: item {record.item!r} of method {record.method!r} has no "
                f"score {name!r}: remove its line and run 'rapid-llm eval' again"
            )
    return Run(folder, settings, records)
