"""Parse JSON with a pydantic model; errors name the place, the field and the value."""

from __future__ import annotations

import json
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from rapid_llm.errors import DataError

T = TypeVar("T")


def parse(adapter: TypeAdapter[T], text: bytes, place: str) -> T:
    """Parse and validate a JSON text.

    Args:
        adapter: type of the value.
        text: JSON text in UTF-8.
        place: place of the text, with which the error begins.

    Raises:
        DataError: the text is no JSON, or not a value of the type.
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
