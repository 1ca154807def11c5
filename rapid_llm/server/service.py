"""Requests answered by the models: prompts, admission, and the parts of an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from starlette.requests import Request as HttpRequest

from rapid_llm.aio import iterate_in_thread
from rapid_llm.config import EngineConfig, RetrievalConfig, SamplingParams, SpeculationConfig
from rapid_llm.errors import ContextWindowError
from rapid_llm.options import changed
from rapid_llm.server.admission import Admission
from rapid_llm.server.errors import ApiError, logger, of_field
from rapid_llm.server.files import FileStore
from rapid_llm.server.metrics import Metrics
from rapid_llm.server.prompts import PromptBuilder, Prompts
from rapid_llm.server.protocol import ChatRequest, CompletionRequest, Request
from rapid_llm.server.settings import ServerConfig
from rapid_llm.stats import Stats
from rapid_llm.tools.answers import ChatDelta, stream_chat
from rapid_llm.tools.definitions import ChatOptions

if TYPE_CHECKING:
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.logprobs import TokenLogprob
    from rapid_llm.results import Delta, FinishReason

_T = TypeVar("_T")


class ClientGoneError(Exception):
    """The client closed the connection before its answer was ready."""


@dataclass(frozen=True)
class Started:
    """What is known of an answer before its first token: its request can be served.

    Attributes:
        progress: progress of the prefill: the model, tokens read, tokens in all.
        prompts: prompts of both models.
        sampling: the sampling options in effect.
    """

    progress: list[tuple[str, int, int]]
    prompts: Prompts
    sampling: SamplingParams


@dataclass(frozen=True)
class Scored:
    """Probabilities of an answer's tokens, known before its last part.

    Attributes:
        logprobs: of each token but the one that ended the answer.
    """

    logprobs: tuple[TokenLogprob, ...]


Part = Started | ChatDelta | Scored  # of an answer, in order


class Service:
    """The models behind the server, and what it keeps between requests.

    Args:
        decoder: the models.
        config: options of the server.
        sampling, speculation, retrieval: defaults of requests.
        embedder: embedding model in any form that ``load_embedder`` takes; by default the config's.
    """

    def __init__(
        self,
        decoder: RapidDecoder,
        config: ServerConfig,
        sampling: SamplingParams,
        speculation: SpeculationConfig,
        retrieval: RetrievalConfig,
        embedder: Any = None,
    ) -> None:
        self.decoder, self.config = decoder, config
        self.sampling, self.speculation = sampling, speculation
        self.name = config.served_model_name or decoder.target.name
        self.admission = Admission(decoder.max_sequences, config.max_queue)
        self.metrics = Metrics(decoder, self.admission)
        folder = None if retrieval.store is None else Path(retrieval.store) / "files"
        self.files = FileStore(folder, config.max_files_bytes)
        self._prompt_builder = PromptBuilder(
            decoder, self.files, retrieval, config.max_documents, embedder
        )
        self._unfinished: set[asyncio.Queue[Part | ApiError | None]] = set()  # parts of answers
        self._stopped = False
        self._engine = decoder.scheduler  # requests are answered at once
        self._models = SimpleNamespace(
            tokenizer=decoder.tokenizer,
            target=decoder.target,
            chat_template_kwargs=decoder.chat_template_kwargs,
            stream=self._engine.stream,
        )

    def close(self) -> None:
        """Delete what was kept for this process only."""
        self.files.close()

    def stop(self) -> None:
        """End all answers that run or wait with an error, and begin no other."""
        self._stopped = True
        if self._unfinished:
            logger.warning(
                "requests that outlasted shutdown_seconds=%d and were ended with an error: %d",
                self.config.shutdown_seconds,
                len(self._unfinished),
            )
        for parts in self._unfinished:
            parts.put_nowait(_shut_down())

    async def answer(self, request: Request) -> AsyncGenerator[Part, None]:
        """Answer a request, once it is its turn; closing the generator stops the models.

        Yields:
            What the models read, then a part of the answer for each round.

        Raises:
            ApiError: too many requests wait, another model is asked for, or the server shuts down.
            RapidError: the request cannot be served.
        """
        if request.model not in (None, self.name):
            raise ApiError(
                404,
                f"the model {request.model!r} is not served, only {self.name!r}: name this one, or "
                "none",
                param="model",
                code="model_not_found",
            )
        if self._stopped:
            raise _shut_down()
        parts: asyncio.Queue[Part | ApiError | None] = asyncio.Queue()
        self._unfinished.add(parts)

        async def work() -> None:
            try:
                async with self.admission.turn():
                    made = iterate_in_thread(lambda check: self._parts(request, check))
                    async with aclosing(made):
                        async for part in made:
                            parts.put_nowait(part)
            finally:
                parts.put_nowait(None)

        # Apart from the reader, so that a client that reads slowly, or not at all, keeps its answer
        # but not its turn.
        task = asyncio.create_task(work())
        task.add_done_callback(lambda _: self._unfinished.discard(parts))
        try:
            while (part := await parts.get()) is not None:
                if isinstance(part, ApiError):
                    raise part
                yield part
            await task
        finally:
            await ended(task)

    def _parts(self, request: Request, check: Callable[[], None]) -> Iterator[Part]:
        """All of an answer, in a thread; ``check`` raises once nobody waits for it."""
        sampling = changed(self.sampling, request.options(SamplingParams))
        speculation = changed(self.speculation, request.options(SpeculationConfig))
        if request.rapid.method == "sd":
            speculation = replace(speculation, mode="exact")
        variables = request.options(EngineConfig).get("chat_template_kwargs", {})
        call = _Call(sampling, speculation, variables, check, [])
        with of_field(request.question, ContextWindowError):
            if isinstance(request, ChatRequest):
                asked = self._chat(request, call)
            else:
                asked = self._completion(cast(CompletionRequest, request), call)
        prompts, tokens = asked.prompts, list[int]()
        last: Stats | None = None
        try:
            with (
                of_field(request.question, ContextWindowError),
                closing(cast(Any, asked.parts)),
            ):
                yield Started(call.progress, prompts, sampling)
                for part in asked.parts:
                    part.stats.omitted_tokens = prompts.omitted_tokens
                    part.stats.draft_skipped = prompts.skipped or part.stats.draft_skipped
                    last = part.stats
                    tokens += part.token_ids
                    if part.finish_reason is not None and request.scored is not None and tokens:
                        yield self._scored(asked, tokens, request.scored)
                    yield part
        finally:
            if last is not None:
                self.metrics.generated(last)

    def _chat(self, request: ChatRequest, call: _Call) -> _Asked:
        given: dict[str, Any] = {"parallel_tool_calls": request.parallel_tool_calls}
        for name in ("tools", "tool_choice", "response_format"):
            given[name] = getattr(request, name)
            with of_field(name):  # beside those before it, which are right
                options = ChatOptions(**given)
        prompts = self._build_prompts(request, request.messages, options, call)
        if prompts.empty:
            return _nothing(prompts)
        parts = stream_chat(
            cast("RapidDecoder", self._models),
            prompts.target,
            prompts.draft,
            options=options,
            confidence=prompts.confidence,
            **call.arguments,
        )
        variables = {**call.variables, **options.template_variables()}
        return _Asked(prompts, prompts.target, prompts.draft, variables, parts)

    def _completion(self, request: CompletionRequest, call: _Call) -> _Asked:
        prompt: Any = request.one_prompt
        draft: Any = request.rapid.draft_prompt
        prompts = Prompts(None, None, request.rapid.confidence)
        if request.documents is not None:
            if draft is not None:
                raise ApiError(
                    400,
                    "documents and rapid.draft_prompt were given: pass the prompt with the "
                    "documents in it, or leave the draft to the server",
                    param="rapid.draft_prompt",
                )
            question = [{"role": "user", "content": prompt}]
            prompts = self._build_prompts(request, question, ChatOptions(), call)
            if prompts.empty:
                return _nothing(prompts)
            prompt, draft = prompts.target, prompts.draft
        elif request.rapid.method == "rag":
            prompt = None
        elif request.rapid.method == "lc":
            draft = None
        deltas = self._engine.stream(prompt, draft, confidence=prompts.confidence, **call.arguments)
        return _Asked(prompts, prompt, draft, call.variables, _as_parts(deltas))

    def _scored(self, asked: _Asked, tokens: list[int], top: int) -> Scored:
        """Probabilities of the tokens for the model that answered."""
        logprobs = self.decoder.logprobs(
            asked.draft if asked.target is None else asked.target,
            tokens,
            top,
            drafter=asked.target is None,
            chat_template_kwargs=asked.variables,
        )
        ended = tokens[-1] in self.decoder.tokenizer.all_special_ids
        return Scored(tuple(logprobs[: len(logprobs) - ended]))

    def _build_prompts(
        self, request: Request, messages: list[dict[str, Any]], options: ChatOptions, call: _Call
    ) -> Prompts:
        """What both models read, where tools are shown to them too."""
        own = self.decoder.chat_template_kwargs
        variables = {**own, **call.variables, **options.template_variables()}
        draft = request.rapid.draft_messages
        return self._prompt_builder.build(
            request, messages, draft, call.sampling, variables, call.check
        )


def _shut_down() -> ApiError:
    return ApiError(
        503,
        "the server shuts down and ended this request: send it again once it runs",
        code="server_shutdown",
    )


class _Call(NamedTuple):
    """Options of a request, what raises once nobody waits for its answer, and its progress."""

    sampling: SamplingParams
    speculation: SpeculationConfig
    variables: dict[str, Any]
    check: Callable[[], None]
    progress: list[tuple[str, int, int]]

    def report(self, whose: str, done: int, total: int) -> None:
        """Note how far the prefill is."""
        self.check()
        self.progress[:] = [(whose, done, total)]

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the decoder."""
        return {
            "sampling": self.sampling,
            "speculation": self.speculation,
            "chat_template_kwargs": self.variables,
            "progress": self.report,
        }


class _Asked(NamedTuple):
    """What the models were asked: both prompts, variables of the template, and the answer."""

    prompts: Prompts
    target: Any
    draft: Any
    variables: dict[str, Any]
    parts: Iterator[ChatDelta]


def _nothing(prompts: Prompts) -> _Asked:
    """The empty answer where nothing was retrieved."""

    def parts() -> Iterator[ChatDelta]:
        yield ChatDelta("", "", (), (), "stop", Stats())

    return _Asked(prompts, None, None, {}, parts())


def _as_parts(deltas: Iterator[Delta]) -> Iterator[ChatDelta]:
    with closing(cast(Any, deltas)):
        for delta in deltas:
            finish: FinishReason | None = delta.finish_reason
            yield ChatDelta(delta.text, "", (), delta.token_ids, finish, delta.stats, delta.origins)


async def ended(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait for its end, before which what it uses cannot be closed.

    Starlette cancels a stream again at each of its awaits, so that one wait is not enough.
    """
    task.cancel()
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # asyncio would log it, with what it may quote


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of work that is cancelled when the client closes the connection.

    Raises:
        ClientGoneError: it did.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        task.cancel()
        left.cancel()
        await asyncio.gather(task, left, return_exceptions=True)
