"""``rapid-llm serve``: an HTTP server with OpenAI's protocol."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import typer

from rapid_llm.cli.app import app
from rapid_llm.cli.options import with_options
from rapid_llm.config import (
    PACKAGED_MODEL,
    EngineConfig,
    RetrievalConfig,
    SamplingParams,
    SpeculationConfig,
)
from rapid_llm.console import status
from rapid_llm.errors import InvalidParameterError, MissingDependencyError
from rapid_llm.server.settings import ServerConfig

_NAME = "rapid-llm"  # of the application on Ray Serve


@app.command()
@with_options(
    ServerConfig,
    EngineConfig,
    RetrievalConfig,
    SamplingParams,
    SpeculationConfig,
    leave_out=("model", "constraint"),
    defaults={"seed": None},
)
def serve(
    server: ServerConfig,
    engine: EngineConfig,
    retrieval: RetrievalConfig,
    sampling: SamplingParams,
    speculation: SpeculationConfig,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Target: hub id, folder, GGUF file, or the packaged model's name.",
        ),
    ] = PACKAGED_MODEL,
) -> None:
    """Serve a model by OpenAI's protocol, with documents that stay read.

    Options of sampling, speculation and retrieval are defaults, which a request may override.
    """
    try:
        import uvicorn
        from uvicorn.config import STARTUP_FAILURE

        from rapid_llm.server.app import create_app
        from rapid_llm.server.draining import DrainingServer
    except ImportError as error:
        raise MissingDependencyError(
            f"a server needs {error.name}, which is not installed; "
            'run: pip install "rapid-llm[server]"'
        ) from error
    server = server.with_key_of_environment()
    port = _port(server.host, server.port)
    engine = replace(engine, model=model)
    defaults: dict[str, Any] = {
        "retrieval": retrieval,
        "sampling": sampling,
        "speculation": speculation,
    }
    if retrieval.embedder is not None or retrieval.store is not None:
        from rapid_llm.context.builder import require_retrieval

        require_retrieval(retrieval)
    if server.replicas > 1:
        server = replace(server, port=port)  # Ray would not say which it took
        with TemporaryDirectory(prefix="rapid-llm-") as folder:  # of uploads, which end with it
            defaults["retrieval"] = replace(retrieval, store=retrieval.store or folder)
            _replicate(engine, server, defaults)
        return
    with status(f"loading {engine.model}", sys.stderr.isatty()):
        from rapid_llm.decoder import RapidDecoder

        decoder = RapidDecoder.from_config(engine)
    logging.disable(logging.NOTSET)  # the command line's quiet; here the log is wanted
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("rapid_llm.server").setLevel(logging.INFO)
    web = create_app(decoder, server, **defaults)
    config = uvicorn.Config(
        web,
        host=server.host,
        port=server.port,
        access_log=False,  # the application logs its requests, without queries
        server_header=False,
    )
    running = DrainingServer(config, web.state.service, server.shutdown_seconds)
    with suppress(KeyboardInterrupt):  # which uvicorn raises again once it has ended
        running.run()
    if not running.started:
        sys.exit(STARTUP_FAILURE)


def _port(host: str, port: int) -> int:
    """The port that the server listens on, a free one for 0; asked for before models are loaded.

    Raises:
        InvalidParameterError: it cannot listen there.
    """
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        bound = [_bound(*place) for place in places]
        ports = [each for each in bound if isinstance(each, int)]
        if not ports:  # some of a name's addresses may not be in use here
            raise cast(OSError, bound[0])
        return ports[0]
    except OSError as error:
        raise InvalidParameterError(
            f"--host {host} --port {port} cannot be listened on ({error.strerror}): end what "
            "listens there, or choose another; port 0 is a free one"
        ) from error


def _bound(family: int, kind: int, protocol: int, _: str, address: Any) -> int | OSError:
    """The port that could be bound, or why none could."""
    try:
        with socket.socket(family, kind, protocol) as probe:
            # As servers do, so that connections that were closed just now hold no port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        return error


def _replicate(engine: EngineConfig, server: ServerConfig, defaults: Mapping[str, Any]) -> None:
    """Serve several replicas until an interrupt or SIGTERM; ``defaults`` are those of requests."""
    try:
        import ray
        from ray import serve

        from rapid_llm.server.ray import application
    except ImportError as error:
        raise MissingDependencyError(
            f"--replicas {server.replicas} needs {error.name}, which is not installed; "
            'run: pip install "rapid-llm[ray]"'
        ) from error
    ray.init(include_dashboard=False, ignore_reinit_error=True)
    serve.start(http_options={"host": server.host, "port": server.port})
    web = application(engine, server=server, **defaults)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())  # Ray's own handler aborts
    try:
        serve.run(web, name=_NAME)
        host = f"[{server.host}]" if ":" in server.host else server.host
        print(f"{server.replicas} replicas run on http://{host}:{server.port}", flush=True)
        with suppress(KeyboardInterrupt):
            while not stopped.wait(1):  # a signal may reach another thread than this
                pass
        serve.delete(_NAME, _blocking=False)  # which lets what runs finish, as a shutdown does not
        until = time.monotonic() + server.shutdown_seconds
        while _NAME in serve.status().applications and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        serve.shutdown()
        ray.shutdown()
