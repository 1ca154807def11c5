"""Replicas on Ray Serve: ``rapid-llm serve MODEL --replicas 2``, or an application of one's own.

An ingress checks a request and forwards it, with its body, to the replica that its documents
belong to, by consistent hashing: so each document is read by one replica only. A replica runs the
application of :mod:`rapid_llm.server.app`.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import os
import pickle
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from tempfile import mkdtemp
from typing import Any, cast

import torch
from fastapi import FastAPI, Request
from ray import serve
from ray.exceptions import RayError, TaskCancelledError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from rapid_llm.config import EngineConfig, RetrievalConfig, SamplingParams, SpeculationConfig
from rapid_llm.options import json_or_text, options_of, sorted_into
from rapid_llm.server.errors import ApiError, Json, api_error
from rapid_llm.server.guards import Guards, path_of
from rapid_llm.server.settings import ServerConfig

_KEPT = ("type", "http_version", "method", "scheme", "path", "raw_path", "root_path",
         "query_string", "headers")  # fmt: skip
"""Parts of a request that a replica needs."""

_DEPLOYMENT = inspect.signature(serve.deployment).parameters
_ONGOING = 1000  # requests at one replica, whose own queue refuses what is too much
_ATTEMPTS = 3  # of a request whose replica died before it said anything


class Replica:
    """The models and their application, in a process of Ray's.

    Args:
        engine: models to load.
        server: options of the server.
        defaults: defaults of requests, as of :func:`rapid_llm.server.app.create_app`.
    """

    def __init__(self, engine: EngineConfig, server: ServerConfig, **defaults: Any) -> None:
        from rapid_llm.decoder import RapidDecoder
        from rapid_llm.server.app import create_app

        # The ingress has checked who asks, and from where.
        inner = replace(server, host="0.0.0.0")
        self._app = create_app(RapidDecoder.from_config(engine), inner, **defaults)

    async def forward(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[bytes, None]:
        """Run the application on a request.

        Yields:
            Pickled messages of ASGI, and the replica's process id before them.
        """
        yield pickle.dumps(os.getpid())
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        bodies = iter([{"type": "http.request", "body": body, "more_body": False}])
        gone = asyncio.Event()

        async def receive() -> Message:
            message = next(bodies, None)
            if message is None:
                await gone.wait()
                return {"type": "http.disconnect"}
            return message

        async def run() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield pickle.dumps(message)
        finally:
            gone.set()
            task.cancel()


class Ingress:
    """Checks requests, and forwards each to the replica of its documents.

    Args:
        replicas: handle of the replicas.
    """

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas

    async def answer(self, request: Request) -> Response:
        """Forward a request; one whose replica dies before it answers is sent to another."""
        body = await request.body()
        scope = {name: request.scope[name] for name in _KEPT if name in request.scope}
        key = session_of(request, body)
        changes = request.method != "GET" and path_of(request.scope).startswith("/v1/files")
        attempts = 1 if changes else _ATTEMPTS  # a file is not to be kept twice
        for attempt in range(attempts):
            messages = self._messages(scope, body, key)
            try:
                process = pickle.loads(await anext(messages))
                start = pickle.loads(await anext(messages))
            except TaskCancelledError:  # the client is gone, so nobody waits for another try
                raise
            except RayServeException as error:
                raise ApiError(
                    503,
                    "no replica takes requests at the moment: try again",
                    code="no_replica",
                    headers={"Retry-After": "1"},
                ) from error
            except RayError as error:
                if attempt < attempts - 1:
                    continue
                raise ApiError(
                    503, "the replica of these documents died: try again", code="replica_died"
                ) from error
            headers = {k.decode(): v.decode("latin-1") for k, v in start["headers"]}
            headers["x-replica"] = str(process)
            headers.pop("x-request-id", None)  # the ingress gives its own
            events = headers.get("content-type", "").startswith("text/event-stream")
            return StreamingResponse(_bodies(messages, events), start["status"], headers)
        raise AssertionError

    async def _messages(
        self, scope: dict[str, Any], body: bytes, key: str | None
    ) -> AsyncGenerator[bytes, None]:
        handle = self._replicas.options(stream=True, **({} if key is None else {"session_id": key}))
        async for message in handle.forward.remote(scope, body):
            yield message


async def _bodies(
    messages: AsyncGenerator[bytes, None], events: bool
) -> AsyncGenerator[bytes, None]:
    """Bodies of a response; where its replica dies, an error event ends a stream of events."""
    async with aclosing(messages):
        try:
            async for message in messages:
                yield pickle.loads(message).get("body", b"")
        except RayError:
            if not events:  # an incomplete body, which the closed connection tells
                raise
            died = ApiError(
                503, "the replica died within the answer: ask again", code="replica_died"
            )
            yield b"data: " + json.dumps(died.body()).encode() + b"\n\ndata: [DONE]\n\n"


def session_of(request: Request, body: bytes) -> str | None:
    """Key of requests that one replica is to serve; None where any replica may.

    The header ``x-session-id`` goes first, then ``prompt_cache_key``, the documents, and the
    beginning of a prompt.
    """
    if given := request.headers.get("x-session-id"):
        return given
    try:
        return _session_of(json.loads(body))
    except (ValueError, RecursionError):  # a replica says what is wrong with it
        return None


def _session_of(asked: Any) -> str | None:
    if not isinstance(asked, dict):
        return None
    if given := asked.get("prompt_cache_key"):
        return str(given)
    common = asked.get("documents")
    if isinstance(common, list):  # in any order, as they are read in the order of their ids
        forms = ({"text": each} if isinstance(each, str) else each for each in common)
        common = sorted(json.dumps(form, sort_keys=True) for form in forms)
    prompt = asked.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], list | str):
        prompt = prompt[0]
    if not common and isinstance(prompt, list | str):
        common = prompt[:512]  # RemoteDecoder's prompts begin with the documents
    if not common:
        return None
    return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()


def application(
    engine: EngineConfig | None = None,
    retrieval: RetrievalConfig | None = None,
    sampling: SamplingParams | None = None,
    speculation: SpeculationConfig | None = None,
    server: ServerConfig | None = None,
    **deployment: Any,
) -> serve.Application:
    """An application for ``serve.run``.

    Args:
        engine, retrieval, sampling, speculation, server: options, as of ``rapid-llm serve``. The
            store must be a folder that all replicas reach; without one it is a temporary folder.
        deployment: arguments of Ray's ``serve.deployment`` for the replicas: ``num_replicas``,
            ``autoscaling_config``, ``ray_actor_options``, …. Unless they say otherwise there are
            ``server.replicas``, with a GPU each where this process sees one.
    """
    server = (server or ServerConfig()).with_key_of_environment()
    retrieval = retrieval or RetrievalConfig()
    if retrieval.store is None:  # uploaded files are every replica's
        retrieval = replace(retrieval, store=mkdtemp(prefix="rapid-llm-"))
    settings: dict[str, Any] = {
        **({} if "autoscaling_config" in deployment else {"num_replicas": server.replicas}),
        "ray_actor_options": {"num_gpus": 1} if torch.cuda.is_available() else {"num_cpus": 0.5},
        "max_ongoing_requests": _ONGOING,
        "graceful_shutdown_timeout_s": server.shutdown_seconds,
        "request_router_config": RequestRouterConfig(
            request_router_class=cast(Any, ConsistentHashRouter)
        ),
    }
    replicas = serve.deployment(**(settings | deployment))(Replica).bind(
        engine or EngineConfig(),
        replace(server, api_key=None),  # the ingress checks it
        retrieval=retrieval,
        sampling=sampling,
        speculation=speculation,
    )
    web = _web(server)
    ingress = serve.deployment(
        max_ongoing_requests=_ONGOING,
        graceful_shutdown_timeout_s=server.shutdown_seconds,
        ray_actor_options={"num_cpus": 0},  # it only passes on
    )(serve.ingress(web)(_Bound))
    return ingress.bind(replicas)


class _Bound(Ingress):
    """The class that Ray makes an ingress of."""


def _web(server: ServerConfig) -> FastAPI:
    web = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @web.api_route("/{path:path}", methods=["GET", "POST", "DELETE"], response_model=None)
    async def forward(request: Request) -> Response:
        ingress = cast(Ingress, serve.get_replica_context().servable_object)
        return await ingress.answer(request)

    async def refuse(request: Request, error: Exception) -> Response:
        shown = api_error(error)
        return Json(shown.body(), shown.status_code, shown.headers)

    web.add_exception_handler(HTTPException, refuse)
    web.add_middleware(
        Guards,
        api_key=server.api_key,
        local=server.local,
        max_body_bytes=server.max_body_bytes,
        answered=_uncounted,
    )
    return web


def _uncounted(scope: Any, status: int) -> None:
    """Ray counts requests itself."""


def app(arguments: dict[str, Any]) -> serve.Application:
    """The application for ``serve run rapid_llm.server.ray:app model=… num_replicas=2``.

    Args:
        arguments: options of ``rapid-llm serve`` and arguments of Ray's ``serve.deployment``, by
            name; a text is read as JSON where it is some, and its option takes more than texts.

    Raises:
        InvalidParameterError: an unknown name, or a value outside its range.
    """
    groups = (EngineConfig, RetrievalConfig, SamplingParams, SpeculationConfig, ServerConfig)
    known = {word: each for each in options_of(*groups).values()
             for word in (each.name, *each.option.aliases)}  # fmt: skip
    read = {
        name: json_or_text(value)
        if isinstance(value, str) and (name not in known or known[name].kinds != (str,))
        else value
        for name, value in arguments.items()
    }
    deployment = {n: read.pop(n) for n in _DEPLOYMENT.keys() & read.keys()}
    return application(*sorted_into({"seed": None} | read, *groups), **deployment)
