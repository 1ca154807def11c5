"""A decoder on a server: ``rapid-llm serve`` with :class:`RapidDecoder`'s signature.

Prompts are encoded here, with the server's tokenizer, and sent as token ids. So whatever builds
prompts for a decoder of this process works with one of another.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from secrets import randbelow
from tempfile import TemporaryDirectory
from threading import Lock
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import httpx

from rapid_llm.api_key import API_KEY, KEY_LIMIT, is_key
from rapid_llm.arguments import arguments_of
from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.errors import (
    ContextWindowError,
    GenerationTimeoutError,
    InvalidParameterError,
    ServerError,
)
from rapid_llm.interface import Decoder, GenerationRequest
from rapid_llm.options import given, options_of
from rapid_llm.progress import PromptProgress
from rapid_llm.results import Delta
from rapid_llm.stats import Stats

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from rapid_llm.encoding import Prompt

_CONNECT = 10.0  # seconds
_RETRIES = 2  # of requests that the server has no room for
_LONGEST_WAIT = 60.0  # seconds between them
_PROGRESS = re.compile(r": (\w+) (\d+) (\d+)")  # other comments are a proxy's
_STATS = frozenset(field.name for field in fields(Stats))
_ERRORS: Mapping[str, type[Exception]] = {
    "context_length_exceeded": ContextWindowError,
    "timeout": GenerationTimeoutError,
}


@dataclass(frozen=True)
class RemoteModel:
    """A model of the server.

    Attributes:
        name: name of the model.
        context_window: context window in tokens.
        model: what is known of the model itself: its ``generation_config``.
    """

    name: str
    context_window: int
    model: Any


class RemoteDecoder(Decoder):
    """The models of a server, in the place of a :class:`rapid_llm.RapidDecoder`.

    Nothing is asked of the server before it is needed. Safe for several threads.

    Args:
        base_url: address of the server, with or without ``/v1``.
        api_key: key of the server; by default that of ``RAPID_LLM_API_KEY`` in the environment.

    Raises:
        InvalidParameterError: the address is no http or https URL, or the key cannot be sent.
        ServerError: (from any use) the server cannot be reached, or refuses the key.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        url = str(base_url).rstrip("/").removesuffix("/v1")
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.userinfo:  # errors, traces and pickles show the address
            raise InvalidParameterError(
                "base_url holds a name or password: pass the server's key as api_key"
            )
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise InvalidParameterError(
                f"base_url={base_url!r} is not allowed: give the address of a server, as "
                "http://127.0.0.1:8000"
            )
        self.base_url = url
        self._key = api_key or os.environ.get(API_KEY) or None
        if self._key is not None and not is_key(self._key):  # the header's error would show it
            raise InvalidParameterError(
                f"api_key=… is not allowed: api_key, or {API_KEY}, must be {KEY_LIMIT}"
            )
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without the key: who opens the pickle finds theirs in the environment."""
        return type(self), (self.base_url,)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The server's tokenizer."""
        return self._about.tokenizer

    @property
    def target(self) -> RemoteModel:
        """The server's target."""
        return self._about.target

    @property
    def drafter(self) -> RemoteModel:
        """The server's drafter; the target in self-speculation."""
        return self._about.drafter

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """The server's variables of the chat template."""
        return dict(self._about.chat_template_kwargs)

    @property
    def _about(self) -> Any:
        with self._lock:
            return self._fetched

    @cached_property
    def _fetched(self) -> Any:
        from transformers import AutoTokenizer, GenerationConfig

        try:
            reply = httpx.get(
                f"{self.base_url}/v1/tokenizer", headers=self._headers, timeout=_CONNECT
            )
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if reply.status_code != 200:
            raise _error(reply.status_code, reply.content)
        try:
            about = reply.json()
            files = about["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"{self.base_url} is no server of rapid-llm: check base_url, and that rapid-llm "
                "serve runs there"
            ) from error
        with TemporaryDirectory() as folder:
            for name, data in files.items():
                (Path(folder) / Path(name).name).write_bytes(base64.b64decode(data))
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

        def model(told: Mapping[str, Any]) -> RemoteModel:
            config = GenerationConfig.from_dict(told["generation_config"])
            return RemoteModel(
                told["name"], told["context_window"], SimpleNamespace(generation_config=config)
            )

        target = model(about["target"])
        drafter = target if about["drafter"] is None else model(about["drafter"])
        return SimpleNamespace(
            tokenizer=tokenizer,
            target=target,
            drafter=drafter,
            chat_template_kwargs=about["chat_template_kwargs"],
        )

    @property
    def scheduler(self) -> RemoteDecoder:
        """This decoder: the server joins the passes of requests that reach it at once."""
        return self

    @arguments_of(GenerationRequest)
    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        """Answer a prompt and yield one delta per round, see :meth:`.RapidDecoder.stream`.

        Without ``sampling`` and ``speculation`` the server's defaults hold. ``progress`` is called
        about once a second during the prefill. Closing the generator stops the server's work.

        Raises:
            InvalidParameterError, ContextWindowError: the request cannot be served.
            GenerationTimeoutError: ``sampling.timeout`` seconds have passed.
            ServerError: the server cannot be reached, refuses, or failed.
        """
        return self._deltas(self._body(request), request.progress)

    @arguments_of(GenerationRequest)
    def astream(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """:meth:`stream` for asyncio; cancelling it stops the server's work."""
        return self._adeltas(self._body(request), request.progress)

    def _stream_many(
        self, requests: Sequence[GenerationRequest], return_exceptions: bool
    ) -> Iterator[tuple[int, Delta | Exception]]:
        from rapid_llm.batching.threads import stream_in_threads  # imports torch

        return stream_in_threads(self.stream, requests, return_exceptions)

    # --- requests ------------------------------------------------------------------------------

    def _body(self, request: GenerationRequest) -> dict[str, Any]:
        """Body of a completion, its prompts encoded."""
        from rapid_llm.chat import checked_variables
        from rapid_llm.encoding import encode_prompt

        variables = self.chat_template_kwargs | checked_variables(request.chat_template_kwargs)

        def ids(prompt: Prompt | None) -> list[int] | None:
            return None if prompt is None else encode_prompt(prompt, self.tokenizer, variables)

        target, draft = ids(request.target_prompt), ids(request.draft_prompt)
        if target is None and draft is None:
            raise InvalidParameterError(
                "target_prompt and draft_prompt are both None; give at least one prompt"
            )
        rapid: dict[str, Any] = {"return_tokens": True, "confidence": request.confidence}
        if request.speculation is not None:
            rapid |= _values(given(request.speculation, SpeculationConfig, "speculation"))
        if draft is not None:
            rapid["draft_prompt"] = draft
        if target is None:
            rapid["method"] = "rag"
        read = draft if target is None else target
        body: dict[str, Any] = {"prompt": read, "stream": True, "rapid": rapid}
        if (sampling := request.sampling) is not None:
            body |= _values(given(sampling, SamplingParams, "sampling"))
            if sampling.seed is None:
                body["seed"] = randbelow(2**63)  # null would be the server's default
        return body

    @property
    def _headers(self) -> dict[str, str]:
        return {} if self._key is None else {"Authorization": f"Bearer {self._key}"}

    @property
    def _request(self) -> dict[str, Any]:
        return {
            "method": "POST",
            "url": f"{self.base_url}/v1/completions",
            "headers": self._headers,
            "timeout": httpx.Timeout(None, connect=_CONNECT),
        }

    def _deltas(
        self, body: dict[str, Any], progress: PromptProgress | None
    ) -> Generator[Delta, None, None]:
        for attempt in range(_RETRIES + 1):
            try:
                with httpx.stream(**self._request, json=body) as reply:
                    if reply.status_code == 429 and attempt < _RETRIES:
                        wait = _wait(reply)
                    elif reply.status_code != 200:
                        raise _error(reply.status_code, reply.read())
                    else:
                        with closing(_read(reply.iter_lines(), progress)) as deltas:
                            yield from deltas
                        return
            except httpx.HTTPError as error:
                raise self._unreachable(error) from error
            time.sleep(wait)

    async def _adeltas(
        self, body: dict[str, Any], progress: PromptProgress | None
    ) -> AsyncGenerator[Delta, None]:
        for attempt in range(_RETRIES + 1):
            try:
                async with (
                    httpx.AsyncClient() as client,
                    client.stream(**self._request, json=body) as reply,
                ):
                    if reply.status_code == 429 and attempt < _RETRIES:
                        wait = _wait(reply)
                    elif reply.status_code != 200:
                        raise _error(reply.status_code, await reply.aread())
                    else:
                        reader = _Reader(progress)
                        lines = cast("AsyncGenerator[str, None]", reply.aiter_lines())
                        async with aclosing(lines):
                            async for line in lines:
                                if (delta := reader.read(line)) is not None:
                                    yield delta
                        reader.finish()
                        return
            except httpx.HTTPError as error:
                raise self._unreachable(error) from error
            await asyncio.sleep(wait)

    def _unreachable(self, error: Exception) -> ServerError:
        reason = str(error) or type(error).__name__
        return ServerError(
            f"the server {self.base_url} cannot be reached, or closed the connection ({reason}): "
            "check base_url, and that rapid-llm serve runs there"
        )


class _Reader:
    """Reads the lines of a stream of events."""

    def __init__(self, progress: PromptProgress | None) -> None:
        self._progress = progress
        self._ended = False

    def read(self, line: str) -> Delta | None:
        """The delta in a line; None where it has none."""
        if self._progress is not None and (told := _PROGRESS.fullmatch(line)):
            self._progress(cast(Any, told[1]), int(told[2]), int(told[3]))
        if not line.startswith("data: ") or line == "data: [DONE]":
            return None
        try:
            event = json.loads(line.removeprefix("data: "))
            delta = None if "error" in event else _delta(event)
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                "the server's answer cannot be read: check base_url, and that rapid-llm serve runs "
                "there, in a version that fits"
            ) from error
        if delta is None:
            raise _raised(event["error"], None)
        self._ended = delta.finish_reason is not None
        return delta

    def finish(self) -> None:
        """Raise ServerError if the answer had no end."""
        if not self._ended:
            raise ServerError("the server closed the connection within an answer: try again")


def _read(lines: Iterator[str], progress: PromptProgress | None) -> Generator[Delta, None, None]:
    reader = _Reader(progress)
    for line in lines:
        if (delta := reader.read(line)) is not None:
            yield delta
    reader.finish()


def _delta(event: Mapping[str, Any]) -> Delta:
    (choice,), rapid = event["choices"], event["rapid"]
    stats = Stats(**{name: value for name, value in rapid["stats"].items() if name in _STATS})
    tokens = rapid["tokens"]
    return Delta(
        choice["text"],
        tuple(token["id"] for token in tokens),
        choice["finish_reason"],
        stats,
        tuple(token["origin"] for token in tokens if token["origin"] is not None),
    )


def _values(settings: Any) -> dict[str, Any]:
    """Options as JSON has them, without those that are None."""
    values = {name: getattr(settings, name) for name in options_of(type(settings))}
    return {name: value for name, value in values.items() if value is not None}


def _wait(reply: httpx.Response) -> float:
    given = reply.headers.get("retry-after", "1")
    return min(float(given) if given.isdecimal() else 1.0, _LONGEST_WAIT)


def _error(status: int, body: bytes) -> Exception:
    try:
        told = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        told = {"message": f"it answered with status {status}", "code": None}
    return _raised(told, status)


def _raised(told: Mapping[str, Any], status: int | None) -> Exception:
    """The error that a server tells of."""
    message = str(told.get("message"))
    kind = _ERRORS.get(str(told.get("code")))
    if kind is None:
        own = told.get("type") == "invalid_request_error" and status in (None, 400)
        kind = InvalidParameterError if own else ServerError
    return kind(message if kind is not ServerError else f"the server refused or failed: {message}")
