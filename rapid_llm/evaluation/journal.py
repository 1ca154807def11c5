"""The folder of a run: every answer is kept as soon as it is there, and never asked for twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rapid_llm.errors import DocumentError, InvalidParameterError
from rapid_llm.evaluation.records import (
    RESULTS,
    SETTINGS,
    Record,
    read_records,
    read_settings,
)


class Journal:
    """Opens a run's folder to go on with it, or makes a new one. Use as a context manager.

    Args:
        folder: where ``results.jsonl`` and ``run.json`` are kept.
        settings: whatever the answers depend on; JSON values.

    Attributes:
        records: those of the run so far.

    Raises:
        InvalidParameterError: the folder holds a run with other settings; names the first.
        DocumentError: the folder cannot be written, or its files are damaged.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        settings = json.loads(json.dumps(settings))  # as they will be read again
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if (self._folder / SETTINGS).exists():
                _require_same(self._folder, settings)
            elif (self._folder / RESULTS).exists():
                raise DocumentError(
                    f"{self._folder} holds {RESULTS} without its {SETTINGS}: give another --out"
                )
            else:
                _replace(self._folder / SETTINGS, settings)
            (self._folder / RESULTS).touch()
            _drop_torn_line(self._folder / RESULTS)
            self.records = read_records(self._folder)
            self._file = (self._folder / RESULTS).open("ab")
        except OSError as error:
            raise DocumentError(
                f"{self._folder} cannot be written ({error}): give another folder with --out"
            ) from error
        self._done = {(record.item, record.method) for record in self.records}

    def __contains__(self, asked: tuple[str, str]) -> bool:
        """Whether (item, method) has its answer."""
        return asked in self._done

    def append(self, record: Record) -> None:
        """Keep an answer: when this returns, it is on the disk."""
        self._file.write(record.as_line().encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)
        self._done.add((record.item, record.method))

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


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


def _replace(path: Path, settings: Mapping[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    new = path.with_suffix(".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _drop_torn_line(path: Path) -> None:
    """Cut what follows the last line end: the line that was being written when a run was killed."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
