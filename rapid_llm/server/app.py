"""The ASGI application."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Match
from starlette.types import Scope

import rapid_llm
from rapid_llm.aio import in_thread
from rapid_llm.config import RetrievalConfig, SamplingParams, SpeculationConfig
from rapid_llm.errors import DocumentError
from rapid_llm.server.answers import respond
from rapid_llm.server.errors import ApiError, Json, api_error, of_field, validation_error
from rapid_llm.server.files import PURPOSES
from rapid_llm.server.guards import Guards, path_of
from rapid_llm.server.models import about
from rapid_llm.server.protocol import ChatRequest, CompletionRequest
from rapid_llm.server.service import ClientGoneError, Service
from rapid_llm.server.settings import ServerConfig

if TYPE_CHECKING:
    from rapid_llm.decoder import RapidDecoder

_BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}
_PAGE = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
"""Headers of the page, which loads nothing and asks this server alone."""

_FILE = "/v1/files/{file_id}"
_FORM = "multipart/form-data"


def create_app(
    decoder: RapidDecoder,
    config: ServerConfig | None = None,
    *,
    sampling: SamplingParams | None = None,
    speculation: SpeculationConfig | None = None,
    retrieval: RetrievalConfig | None = None,
    embedder: Any = None,
) -> FastAPI:
    """The server's application, for any ASGI server.

    Args:
        decoder: the models.
        config: options of the server; ``host`` and ``port`` only tell who reaches it.
        sampling, speculation, retrieval: defaults of requests. Without ``sampling`` each request
            draws afresh.
        embedder: embedding model in any form that ``rapid_llm.context.load_embedder`` takes; by
            default the retrieval options'.
    """
    config = config or ServerConfig()
    service = Service(
        decoder,
        config,
        sampling or SamplingParams(seed=None),
        speculation or SpeculationConfig(),
        retrieval or RetrievalConfig(),
        embedder,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="rapid-llm", version=rapid_llm.__version__, lifespan=lifespan, docs_url=None,
        redoc_url=None,
    )  # fmt: skip
    app.state.service = service
    _add_errors(app, service)
    _add_answers(app, service)
    _add_files(app, service)
    _add_information(app, service)

    def answered(scope: Scope, status: int) -> None:
        route = scope.get("route")  # its path has no ids in it, so that there are few labels
        service.metrics.answered(getattr(route, "path", "other"), status)

    app.add_middleware(
        Guards,
        api_key=config.api_key,
        local=config.local,
        max_body_bytes=config.max_body_bytes,
        answered=answered,
    )
    return app


def _add_errors(app: FastAPI, service: Service) -> None:
    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientGoneError):
            service.metrics.cancelled()
            return Response(status_code=499)
        if isinstance(error, RequestValidationError):
            shown = validation_error(error.errors(), _BODIES.get(path_of(request.scope)))
        elif type(error) is HTTPException and error.status_code in (404, 405):
            shown = _not_served(app, request.scope)
        else:
            shown = api_error(error)
        return Json(shown.body(), shown.status_code, shown.headers)

    for kind in (RequestValidationError, HTTPException, rapid_llm.RapidError, ClientGoneError):
        app.add_exception_handler(kind, refuse)


def _not_served(app: FastAPI, scope: Scope) -> ApiError:
    """What is served, where a path is unknown or is asked by another method."""
    path = path_of(scope)
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    asked = [route for route in routes if route.matches(scope)[0] is not Match.NONE]
    if asked:
        methods = sorted({method for route in asked for method in route.methods or ()})
        return ApiError(
            405,
            f"{path!r} does not take {scope['method']}: send {' or '.join(methods)}",
            headers={"Allow": ", ".join(methods)},
        )
    known = ", ".join(dict.fromkeys(route.path for route in routes))
    return ApiError(
        404,
        f"{path!r} is not served; known are {known}: the base URL of a client ends in /v1, once",
    )


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await respond(service, body, request)

    @app.post("/v1/completions", response_model=None)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        return await respond(service, body, request)


def _add_files(app: FastAPI, service: Service) -> None:
    @app.post("/v1/files", response_model=None)
    async def upload(request: Request) -> dict[str, Any]:
        if not request.headers.get("content-type", "").lower().startswith(_FORM):
            raise ApiError(
                400, f"the body is no form: send {_FORM} with a field file", param="file"
            )
        async with request.form(max_files=1, max_fields=4) as form:
            file, purpose = form.get("file"), form.get("purpose", PURPOSES[0])
            if unknown := form.keys() - {"file", "purpose"}:
                raise ApiError(
                    400,
                    f"unknown field {min(unknown)!r}; known are file, purpose",
                    param=min(unknown),
                    code="unknown_parameter",
                )
            if not isinstance(file, UploadFile):
                raise ApiError(
                    400, "the form has no file: send one as the field file", param="file"
                )
            if purpose not in PURPOSES:
                raise ApiError(
                    400,
                    f"purpose={purpose!r} is not allowed: files are read as documents, so take "
                    f"{' or '.join(PURPOSES)}",
                    param="purpose",
                )
            name = file.filename or "document"
            with of_field("file", DocumentError):
                stored = await in_thread(lambda: service.files.add(file.file, name, str(purpose)))
        return stored.as_dict()

    @app.get("/v1/files")
    async def list_files(request: Request) -> dict[str, Any]:
        if unknown := request.query_params.keys():
            raise ApiError(
                400,
                f"unknown parameter {min(unknown)!r}: all files are listed, so leave it out",
                param=min(unknown),
                code="unknown_parameter",
            )
        files = [file.as_dict() for file in await in_thread(lambda: list(service.files))]
        return {"object": "list", "data": files, "has_more": False}

    @app.get(_FILE)
    async def get_file(file_id: str) -> dict[str, Any]:
        return service.files.get(file_id).as_dict()

    @app.get(f"{_FILE}/content")
    async def content(file_id: str) -> PlainTextResponse:
        return PlainTextResponse(await in_thread(lambda: service.files.text(file_id)))

    @app.delete(_FILE)
    async def delete_file(file_id: str) -> dict[str, Any]:
        service.files.delete(file_id)
        return {"id": file_id, "object": "file", "deleted": True}


def _add_information(app: FastAPI, service: Service) -> None:
    decoder, started = service.decoder, int(time.time())
    model = {
        "id": service.name,
        "object": "model",
        "created": started,
        "owned_by": "rapid-llm",
        "max_model_len": decoder.target.context_window,
        "drafter": decoder.drafter.name,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise ApiError(
                404,
                f"the model {name!r} is not served, only {service.name!r}",
                code="model_not_found",
            )
        return model

    page = (resources.files("rapid_llm") / "server" / "page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=_PAGE)

    @app.get("/v1/tokenizer")
    async def tokenizer() -> dict[str, Any]:
        return await in_thread(lambda: about(decoder))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": rapid_llm.__version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
