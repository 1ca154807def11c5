"""``rapid-llm serve``: an HTTP server with OpenAI's protocol."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

from rapid_llm.api_key import API_KEY
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
        typer.Argument(help="Target: hub id, folder, GGUF file, or the packaged model's name."),
    ] = PACKAGED_MODEL,
) -> None:
    """Serve a model by OpenAI's protocol, with documents that stay read.

    Options of sampling, speculation and retrieval are defaults, which a request may override.
    """
    try:
        import uvicorn

        from rapid_llm.server.app import create_app
    except ImportError as error:
        raise MissingDependencyError(
            f"a server needs {error.name}, which is not installed; "
            'run: pip install "rapid-llm[server]"'
        ) from error
    server = server.with_key_of_environment()
    if not server.local and server.api_key is None:
        raise InvalidParameterError(
            f"--host {server.host} lets other machines ask, so that a key is needed: give one as "
            f"--api-key or in {API_KEY}"
        )
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
        _replicate(engine, server, defaults)
        return
    with status(f"loading {engine.model}", sys.stderr.isatty()):
        from rapid_llm.decoder import RapidDecoder

        decoder = RapidDecoder.from_config(engine)
    logging.disable(logging.NOTSET)  # the command line's quiet; here the log is wanted
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("rapid_llm.server").setLevel(logging.INFO)
    web = create_app(decoder, server, **defaults)
    uvicorn.run(
        web,
        host=server.host,
        port=server.port,
        access_log=False,  # the application logs its requests, without queries
        timeout_graceful_shutdown=server.shutdown_seconds,
        server_header=False,
    )


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
    import torch

    own = {"num_gpus": 1} if torch.cuda.is_available() else {"num_cpus": 0.5}
    ray.init(include_dashboard=False, ignore_reinit_error=True)
    serve.start(http_options={"host": server.host, "port": server.port})
    deployment = {"num_replicas": server.replicas, "ray_actor_options": own}
    web = application(engine, server=server, **defaults, **deployment)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())  # Ray's own handler aborts
    try:
        serve.run(web)
        print(f"{server.replicas} replicas run on http://{server.host}:{server.port}", flush=True)
        while not stopped.wait(1):  # a signal may reach another thread than this
            pass
    finally:
        serve.shutdown()
        ray.shutdown()
