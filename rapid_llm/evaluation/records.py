"""What an evaluation writes: one JSON line an answer, and the settings of the run beside them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rapid_llm.errors import DocumentError

RESULTS = "results.jsonl"
SETTINGS = "run.json"


@dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        task: name of the task.
        item: id of the item.
        method: name of the method with its options, such as ``rapid η=10`` or
            ``rapid η=10, irrelevant``.
        base: the method without options: ``lc``, ``rag``, ``sd``, ``rapid``, ``streaming``,
            ``triforce``, ``rest``, ``speculative-rag``.
        options: what distinguishes it: ``eta``, ``gamma``, ``mode``, ``context_tokens``,
            ``chunk_tokens``, ``retriever``, ``irrelevant``, ``dynamic_eta``, ….
        answer: the text that was scored.
        scores: by metric.
        groups: the item's.
        stats: of the generation (``Stats.as_dict()``).
        accepted_at: for each position of a draft, 1st, 2nd, …: (times judged, times accepted).
        retrieved: whether a reference stood in what the drafter read; None if nothing was.
    """

    task: str
    item: str
    method: str
    base: str
    options: Mapping[str, Any]
    answer: str
    scores: Mapping[str, float]
    groups: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, Any] = field(default_factory=dict)
    accepted_at: tuple[tuple[int, int], ...] = ()
    retrieved: bool | None = None

    def as_line(self) -> str:
        """One line of JSON, its end included."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def add_positions(counts: Iterable[Sequence[tuple[int, int]]]) -> tuple[tuple[int, int], ...]:
    """The sum of several :attr:`Record.accepted_at`."""
    return tuple(
        (sum(judged for judged, _ in at), sum(accepted for _, accepted in at))
        for at in zip_longest(*counts, fillvalue=(0, 0))
    )


def read_records(folder: str | Path) -> list[Record]:
    """Every answer of a run, in the order in which they were given.

    A last line without an end is one whose writing was interrupted, and is left out.

    Raises:
        DocumentError: there is no such file, or a line of it is no record; names line and field.
    """
    path = Path(folder) / RESULTS
    whole, _, _torn = _read(path).rpartition(b"\n")
    lines = _decode(whole, path).split("\n") if whole else []
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The settings of a run; ``metrics`` among them, the task's, its headline first.

    Raises:
        DocumentError: there is no such file, or it is no JSON object.
    """
    path = Path(folder) / SETTINGS
    return _object(_decode(_read(path), path), str(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DocumentError(
            f"{path} cannot be read ({error}): give the folder that 'rapid-llm eval --out' wrote"
        ) from error


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path} is not UTF-8 ({error}): remove it, or restore it") from error


def _object(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DocumentError(f"{place} is not JSON ({error}): remove it, or restore it") from error
    if not isinstance(value, dict):
        raise DocumentError(f"{place} is {type(value).__name__}, not a JSON object: remove it")
    return value


def _record(line: str, place: str) -> Record:
    values = _object(line, place)
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(Record)}
    for name in values.keys() - known.keys():
        raise DocumentError(f"{place}: field {name!r} is unknown; known are {', '.join(known)}")
    for name, required in known.items():
        if required and name not in values:
            raise DocumentError(f"{place}: field {name!r} is missing: remove the line")
    for name in ("options", "scores", "groups", "stats"):
        if not isinstance(values.get(name, {}), dict):
            raise DocumentError(f"{place}: field {name!r} is not a JSON object: remove the line")
    try:
        accepted = tuple((int(n), int(k)) for n, k in values.get("accepted_at", ()))
    except (TypeError, ValueError) as error:
        raise DocumentError(
            f"{place}: field 'accepted_at' is not a list of pairs of numbers: remove the line"
        ) from error
    return Record(**values | {"accepted_at": accepted})
