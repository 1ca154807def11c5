"""JSON checked against a pydantic model: an error names the place, the field and the value."""

from __future__ import annotations

import json
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from rapid_llm.errors import DataError

T = TypeVar("T")


def parse(adapter: TypeAdapter[T], text: bytes, place: str) -> T:
    """The value that a JSON text holds.

    Raises:
        DataError: it is no JSON, or no such value; begins with ``place``.
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
