"""Find and read the files of a benchmark or a run; errors name the place, field and value."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, TypeVar, cast

from huggingface_hub import hf_hub_download
from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError

from rapid_llm.errors import DataError

Text = Annotated[str, Field(pattern=r"\S", strict=True)]
"""A text that is not blank."""

Texts = Annotated[
    tuple[Text, ...],
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
    Field(min_length=1),
]
"""A list of texts; a single text counts as a list of one."""

T = TypeVar("T")
R = TypeVar("R", bound=BaseModel)


def locate(data: Path | None, name: str, repository: str | None = None) -> Path:
    """Path of a benchmark's file.

    Args:
        data: the file, or the folder with it; None downloads it.
        name: name of the file.
        repository: data set of the benchmark on the hub; None if there is none.

    Raises:
        DataError: there is no such file, or it cannot be downloaded.
    """
    if data is not None:
        path = data / name if data.is_dir() else data
        if path.is_file():
            return path
        raise DataError(
            f"{path} does not exist: give {name}, or the folder with it, as --data PATH"
        )
    if repository is None:
        raise DataError(f"the task needs its data: give {name} with --data PATH")
    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except Exception as error:  # the client's errors have no common base
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise DataError(
            f"{name} of {repository} could not be downloaded ({reason}): check the connection, or "
            "give a local copy with --data PATH"
        ) from error


def read_object(path: Path, kind: type[R]) -> R:
    """Read a file with one JSON object.

    Raises:
        DataError: the file cannot be read, or is something else.
    """
    with _reading(path) as file:
        return parse(TypeAdapter(kind), file.read(), str(path))


def read_rows(path: Path, kind: type[R]) -> Iterator[R]:
    """Read the objects of a JSON Lines file, one by one, or of a file with one JSON list.

    Raises:
        DataError: the file cannot be read, or holds no objects or other ones.
    """
    adapter, row = TypeAdapter(kind), None
    with _reading(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.lstrip().startswith(b"["):
                rows: TypeAdapter[list[R]] = TypeAdapter(list[kind])  # type: ignore[valid-type]
                for row in parse(rows, line + file.read(), str(path)):
                    yield row
            elif line.strip():
                yield (row := parse(adapter, line, f"{path}, line {number}"))
    if row is None:
        raise DataError(f"{path} is empty: give a file with items as --data PATH")


@contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield cast("IO[bytes]", file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}): give another as --data PATH") from error


def parse(adapter: TypeAdapter[T], text: bytes, place: str) -> T:
    """Parse and validate a JSON text in UTF-8.

    Raises:
        DataError: the text, at ``place``, is no JSON, or not a value of the adapter's type.
    """
    try:
        return adapter.validate_json(text.removeprefix(b"\xef\xbb\xbf"))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    what = problem["msg"].removeprefix("Value error, ")
    if problem["loc"]:
        path = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in problem["loc"])
        shown = json.dumps(problem["input"], ensure_ascii=False, default=str)[:60]
        what = f"{path.removeprefix('.')}: {what}; there is {shown}"
    raise DataError(f"{place}: {what}. Correct or replace the file")
