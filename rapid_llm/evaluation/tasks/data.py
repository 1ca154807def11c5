"""Reading a benchmark's files: every error names the file, the line and the field."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from huggingface_hub import hf_hub_download

from rapid_llm.errors import DataError


@dataclass(frozen=True)
class Row:
    """One object of a file.

    Attributes:
        place: where it stands, such as ``data.jsonl, line 3``.
        fields: what it holds, unchecked.
    """

    place: str
    fields: dict[str, Any]

    def text(self, field: str) -> str:
        """The field's text.

        Raises:
            DataError: it is not there, no text, or empty.
        """
        value = self._get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(field, f"is {_brief(value)}, not a text")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """The field's list of texts, at least one; a single text counts as a list of one.

        Raises:
            DataError: it is not there, or something else.
        """
        value = self._get(field)
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
            raise self.wrong(field, f"is {_brief(value)}, not a list of texts")
        return tuple(texts)

    def choice(self, field: str, choices: Sequence[str]) -> str:
        """The field's text, which has to be one of ``choices``.

        Raises:
            DataError: it is not there, or something else.
        """
        value = self._get(field)
        if value not in choices:
            raise self.wrong(field, f"is {_brief(value)}, not one of {', '.join(choices)}")
        return str(value)

    def rows(self, field: str) -> list[Row]:
        """The objects in the field's list, which may be empty.

        Raises:
            DataError: it is not there, or something else.
        """
        value = self._get(field)
        if not isinstance(value, list):
            raise self.wrong(field, f"is {_brief(value)}, not a list of objects")
        return [_row(f"{self.place}, {field}[{i}]", entry) for i, entry in enumerate(value)]

    def wrong(self, field: str, problem: str) -> DataError:
        """The error that says so of a field."""
        return DataError(
            f"{self.place}: the field {field!r} {problem}; correct the file, or give another "
            "with --data PATH"
        )

    def _get(self, field: str) -> Any:
        if field not in self.fields:
            held = ", ".join(map(repr, self.fields)) or "nothing"
            raise self.wrong(field, f"is missing (there is {held})")
        return self.fields[field]


def locate(data: Path | None, name: str, repository: str | None = None) -> Path:
    """The file to read: ``data`` itself, ``name`` in the folder ``data``, or that of the hub.

    Args:
        data: a file or a folder; None downloads.
        name: of the benchmark's file.
        repository: the benchmark's data set on the hub; None if it has none there.

    Raises:
        DataError: there is no such file, or it cannot be downloaded.
    """
    if data is None:
        if repository is None:
            raise DataError(f"the task needs its data: give {name} with --data PATH")
        return _download(repository, name)
    path = data / name if data.is_dir() else data
    if not path.is_file():
        raise DataError(
            f"{path} does not exist: give {name}, or the folder with it, as --data PATH"
        )
    return path


def read_object(path: Path) -> Row:
    """The one JSON object that a file is; ``.gz`` is unpacked.

    Raises:
        DataError: it cannot be read, or is something else.
    """
    with _reading(path) as file:
        return _row(str(path), _parse(path, 1, file.read()))


def read_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSON Lines file, read one by one, or of a file that is one JSON list.

    ``.gz`` is unpacked.

    Raises:
        DataError: it cannot be read, is no JSON, or holds no objects.
    """
    rows = 0
    with _reading(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.lstrip().startswith(b"["):
                for rows, entry in enumerate(_parse(path, 1, line + file.read()), 1):
                    yield _row(f"{path}, item {rows}", entry)
            elif line.strip():
                rows += 1
                yield _row(f"{path}, line {number}", _parse(path, number, line.rstrip()))
    if not rows:
        raise DataError(f"{path} is empty: give a file with items as --data PATH")


@contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield cast("IO[bytes]", file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({error}): give a JSON file, or one packed as .gz, as "
            "--data PATH"
        ) from error


def _parse(path: Path, line: int, text: bytes) -> Any:
    """The JSON value that begins on this line."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        place, problem = text.count(b"\n", 0, error.start), "UTF-8"
    except json.JSONDecodeError as error:
        place, problem = error.lineno - 1, f"JSON ({error.msg} at column {error.colno})"
    raise DataError(
        f"{path}, line {line + place} is no {problem}; correct the file, or give another with "
        "--data PATH"
    )


def _row(place: str, entry: object) -> Row:
    if not isinstance(entry, dict):
        raise DataError(
            f"{place} is {_brief(entry)}, not an object with fields; correct the file, or give "
            "another with --data PATH"
        )
    return Row(place, entry)


def _download(repository: str, name: str) -> Path:
    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except Exception as error:  # the client's errors have no common base
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise DataError(
            f"{name} of {repository} could not be downloaded ({reason}): check the connection, or "
            "give a local copy with --data PATH"
        ) from error


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"
