"""Errors in OpenAI's form: which status, type and code an error of the library has."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, get_args

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from rapid_llm.errors import (
    ContextWindowError,
    DocumentError,
    GenerationTimeoutError,
    InvalidParameterError,
    MissingDependencyError,
    RapidError,
    TokenizerMismatchError,
)

logger = logging.getLogger("rapid_llm.server")

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""Id of the request that is answered, by which the log tells of its errors."""

NO_RETRY = {"x-should-retry": "false"}
"""Header by which OpenAI's client does not send a request again that would fail again."""


class Json(JSONResponse):
    """A response in ASCII, which carries a client's lone surrogates, as UTF-8 does not."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class ApiError(HTTPException):
    """An error as a client sees it.

    Args:
        status: status of the response.
        message: description of the error, with the limit and the remedy.
        param: name of the request's field; None if it is of no field.
        code: OpenAI's word for it; None without one.
        headers: headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        return {
            "error": {
                "message": self.detail,
                "type": _TYPES.get(self.status_code, _type_of(self.status_code)),
                "param": self.param,
                "code": self.code,
            }
        }


class FieldError(ValueError):
    """A field whose value does not go with the others of its request.

    Args:
        field: the field, with a dot before each part.
        message: description of the error.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@contextmanager
def of_field(field: str, kind: type[RapidError] = RapidError) -> Iterator[None]:
    """Name the field that errors of a kind are of, where they are raised without one.

    Raises:
        ApiError: an error of this kind was raised within.
    """
    try:
        yield
    except kind as error:
        shown = api_error(error)
        shown.param = shown.param or field
        raise shown from error


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

_UNREADABLE: dict[type, str] = {
    UnicodeDecodeError: "its bytes are not UTF-8",
    RecursionError: "it is nested too deep",
    ValueError: "a number in it has too many digits",
}
"""What is wrong with a body that FastAPI cannot parse, by the error that it keeps as the cause."""


def _type_of(status: int) -> str:
    return "invalid_request_error" if status < 500 else "server_error"


def api_error(error: BaseException) -> ApiError:
    """The error that a client sees of one that was raised.

    The text of an unexpected error stays out of the answer and the log, as it may quote a document:
    the log tells its type and where it was raised.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        if (reason := _UNREADABLE.get(type(error.__cause__))) is not None:
            return ApiError(400, f"the body is not JSON ({reason})")
        return ApiError(error.status_code, error.detail, headers=error.headers)
    if isinstance(error, ContextWindowError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, InvalidParameterError | DocumentError | TokenizerMismatchError):
        return ApiError(400, str(error))
    if isinstance(error, GenerationTimeoutError):
        return ApiError(504, str(error), param="timeout", code="timeout", headers=NO_RETRY)
    if isinstance(error, MissingDependencyError):
        return ApiError(501, str(error), code="not_installed", headers=NO_RETRY)
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    places = " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(frames))
    logger.error("%s %s at %s", request_id.get(), type(error).__name__, places)
    if isinstance(error, RapidError):
        return ApiError(500, str(error), headers=NO_RETRY)
    return ApiError(
        500,
        f"the server failed ({type(error).__name__}); its log says where, under the request's id",
        code="internal_error",
        headers=NO_RETRY,
    )


def validation_error(
    errors: Sequence[Mapping[str, Any]], body: type[BaseModel] | None = None
) -> ApiError:
    """The error of a body that pydantic refuses: the first of its errors, in a sentence.

    Args:
        errors: pydantic's errors.
        body: form of the body, whose fields are told where one is unknown.
    """
    first = errors[0]
    where = [part for part in first["loc"] if part != "body"]
    raised = first.get("ctx", {}).get("error")
    field = raised.field if isinstance(raised, FieldError) else ".".join(map(str, where)) or None
    kind = first["type"]
    if kind == "extra_forbidden":
        known = ", ".join(_fields(body, where[:-1]))
        return ApiError(
            400,
            f"unknown field {field!r}" + (f"; known are {known}" if known else ""),
            param=field,
            code="unknown_parameter",
        )
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON ({first.get('ctx', {}).get('error', '')})")
    if kind == "missing":
        what = f"the field {field!r} is missing" if field else "the body is missing"
        return ApiError(400, what, param=field, code="missing_required_parameter")
    if not where and kind in ("model_attributes_type", "model_type"):
        return ApiError(
            400, "the body is not a JSON object: send one, with Content-Type: application/json"
        )
    message = str(first["msg"]).removeprefix("Value error, ")
    if kind != "value_error":  # pydantic's own sentences do not name the field
        message = f"{field}: {message}" if field else message
    return ApiError(400, message, param=field)


def _fields(form: type[BaseModel] | None, path: Sequence[Any]) -> list[str]:
    """Fields of a part of a body: of the body itself where the path is empty."""
    for name in path:
        annotation = form.model_fields[name].annotation if form else None
        parts = get_args(annotation) or (annotation,)  # those of a union
        form = next((p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)), None)
    return list(form.model_fields) if form else []
