"""Results folder of a run: its settings, and each answer, written as soon as it is known."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from rapid_llm.errors import DataError, InvalidParameterError
from rapid_llm.evaluation.data import parse

RESULTS = "results.jsonl"
SETTINGS = "run.json"

Positions = tuple[tuple[int, int], ...]
"""For each position of a draft, 1st, 2nd, …: (times judged, times accepted)."""


class Record(BaseModel, frozen=True, extra="forbid"):
    """One answer, a line of ``results.jsonl``."""

    task: str
    item: str  # id of the item
    method: str  # method with its options, such as "rapid η=10, irrelevant"
    base: str  # method without options, such as "rapid"
    options: Mapping[str, Any]
    answer: str  # text that was scored
    scores: Mapping[str, float]  # scores by metric
    groups: Mapping[str, str] = {}  # groups of the item
    stats: Mapping[str, Any] = {}  # Stats.as_dict() of the generation
    accepted_at: Positions = ()  # acceptance by position in the draft
    retrieved: bool | None = None  # whether a reference was retrieved; None if that cannot be told
    at_once: int = 1  # number of answers that were decoded at once, so that none is timed if > 1


def add_positions(counts: Iterable[Positions]) -> Positions:
    """Sum of counts, position by position."""
    each = zip_longest(*counts, fillvalue=(0, 0))
    return tuple((sum(n for n, _ in at), sum(k for _, k in at)) for at in each)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run, including the task's ``metrics``, the headline first."""
    path = folder / SETTINGS
    return parse(TypeAdapter(dict[str, Any]), _read(path), str(path))


def read_records(folder: Path) -> list[Record]:
    """All answers of a run, in order.

    A last line without a line end, whose writing was interrupted, is left out.

    Raises:
        DataError: a line is no record; names the line and the field.
    """
    path, record = folder / RESULTS, TypeAdapter(Record)
    lines = _read(path).split(b"\n")[:-1]
    return [parse(record, line, f"{path}, line {n}") for n, line in enumerate(lines, 1)]


def read_run(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """The settings and the answers of a run.

    Raises:
        DataError: they are damaged, or there is no answer.
    """
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


class Journal:
    """Opens the folder of a run to resume it, or makes a new one; ``records`` are its answers.

    ``settings`` are all that the answers depend on.

    Raises:
        InvalidParameterError: the folder holds a run with other settings.
        DataError: the folder cannot be written, or its files are damaged.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._path = folder / RESULTS
        settings = json.loads(json.dumps(settings))  # as they will be read again
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / SETTINGS).exists():
                _require_same(folder, settings)
            elif self._path.exists():
                raise DataError(f"{folder} has {RESULTS} without {SETTINGS}: give another --out")
            else:  # written atomically
                _write(folder / "run.new", json.dumps(settings, indent=2, ensure_ascii=False))
                (folder / "run.new").replace(folder / SETTINGS)
            with self._path.open("ab") as file:  # drop the line that was cut off by a kill
                file.truncate(self._path.read_bytes().rfind(b"\n") + 1)
        except OSError as error:
            raise DataError(
                f"{folder} cannot be written ({error}): give another folder with --out"
            ) from error
        self.records = read_records(folder)
        self._done = {(record.item, record.method) for record in self.records}

    def __contains__(self, asked: tuple[str, str]) -> bool:
        """Whether (item, method) has its answer."""
        return asked in self._done

    def append(self, record: Record) -> None:
        """Add an answer, which is on the disk when this returns."""
        _write(self._path, record.model_dump_json())
        self.records.append(record)
        self._done.add((record.item, record.method))


def _require_same(folder: Path, settings: Mapping[str, Any]) -> None:
    before = read_settings(folder)
    for name in [*settings, *before]:
        old, new = before.get(name), settings.get(name)
        if old != new:
            raise InvalidParameterError(
                f"{folder} holds a run with {name}={json.dumps(old)}, and now it is "
                f"{json.dumps(new)}: only the methods and --limit may change; give another --out, "
                "or the same settings"
            )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error}): give the folder that 'rapid-llm eval --out' wrote"
        ) from error


def _write(path: Path, line: str) -> None:
    """Append a line to a file; it is on the disk when this returns."""
    with path.open("ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
