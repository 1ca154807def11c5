"""ASGI middleware: request ids, API key, allowed hosts and origins, limits on bodies."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rapid_llm.server.errors import ApiError, Json, api_error, request_id
from rapid_llm.server.settings import is_loopback

logger = logging.getLogger("rapid_llm.server")

OPEN = frozenset({"/", "/health"})
"""Paths that need no key: they tell nothing."""

_UNANSWERED = 499  # nginx' status of a request whose client went away


class Guards:
    """Middleware that refuses requests before anything is read of them, and logs all.

    Neither bodies nor queries are logged.

    Args:
        app: the application.
        api_key: key that requests must bring; None for none.
        local: whether the server listens on loopback only, so that another name in ``Host`` is a
            web page's that was given this address.
        max_body_bytes: maximum length of a body.
        answered: function that is told each request's path and status.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        local: bool,
        max_body_bytes: int,
        answered: Callable[[Scope, int], None],
    ) -> None:
        self._app, self._local, self._most = app, local, max_body_bytes
        self._key = None if api_key is None else api_key.encode()
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = f"req_{uuid4().hex}"
        request_id.set(name)
        started, status, ended = time.monotonic(), _UNANSWERED, False
        if scope["method"] == "HEAD":  # is answered as GET, and the web server sends no body
            scope = {**scope, "method": "GET"}

        async def identified(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            ended = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, self._limited(receive, path_of(scope)), identified)
        except ClientDisconnect:  # within its body: there is nobody to answer
            pass
        except Exception as error:
            # Here and not in an outer middleware, which would log the error with its text.
            shown = api_error(error)
            if status == _UNANSWERED:
                response = Json(shown.body(), shown.status_code, shown.headers)
                await response(scope, receive, identified)
            status, ended = shown.status_code, True
        finally:
            if not ended:  # the client left, perhaps in the middle of its stream
                status = _UNANSWERED
            self._answered(scope, status)
            seconds = time.monotonic() - started
            logger.info("%s %s %r %d %.3f s", name, scope["method"], scope["path"], status, seconds)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._local and not is_loopback(_name_of(host) or ""):
            raise ApiError(403, f"the host {host!r} is not this machine: ask for 127.0.0.1")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(403, f"pages of {origin!r} may not use this server")
        if self._key is not None and path_of(scope) not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode(), self._key)
            if scheme.lower() != "bearer" or not same:
                raise ApiError(
                    401,
                    "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most:
            raise self._too_long(path_of(scope))

    def _limited(self, receive: Receive, path: str) -> Receive:
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise self._too_long(path)
            return message

        return limited

    def _too_long(self, path: str) -> ApiError:
        if path == "/v1/files":
            remedy = "upload a part of the document"
        else:
            remedy = "upload documents with /v1/files once, or send fewer"
        return ApiError(
            413,
            f"the body is longer than the server's --max-body-bytes, {self._most:,}: {remedy}, or "
            "raise it there",
            code="body_too_long",
        )


def path_of(scope: Scope) -> str:
    """Path of a request within the application, which may stand under a path of another one."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _name_of(host: str) -> str | None:
    """Name or address in a ``Host`` header, without the port; None if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
