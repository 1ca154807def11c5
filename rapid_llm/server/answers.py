"""Answers in OpenAI's form, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from itertools import accumulate, zip_longest
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from rapid_llm.server.errors import Json, api_error
from rapid_llm.server.protocol import ChatRequest, Request
from rapid_llm.server.service import Part, Scored, Service, Started, ended, unless_gone
from rapid_llm.speculation.sampling import generation_config, stop_strings
from rapid_llm.stats import Stats
from rapid_llm.text import TextStream
from rapid_llm.tools.answers import ChatAnswer, ChatDelta

if TYPE_CHECKING:
    from rapid_llm.logprobs import TokenLogprob

_PATIENCE = 1.0  # seconds after which a stream tells how far the prefill is
_INCOMPLETE = "\ufffd"
_DONE = b"data: [DONE]\n\n"


async def respond(service: Service, request: Request, http: HttpRequest) -> Response:
    """Answer a request.

    The first part is awaited before the response begins, so that a request that cannot be served
    has the status of its error.

    Raises:
        ClientGoneError: the client closed the connection first.
        RapidError, ApiError: the request cannot be served.
    """
    parts = service.answer(request)
    form: _Form = (
        _Chat(service, request) if isinstance(request, ChatRequest) else _Text(service, request)
    )
    if request.stream:
        started = await unless_gone(http, _first(parts))
        return EventStream(_events(form, started, parts), parts, service.metrics.cancelled)
    return Json(await unless_gone(http, _whole(form, parts)))


async def _first(parts: AsyncGenerator[Part, None]) -> Started:
    try:
        first = await anext(parts)
    except BaseException:
        await parts.aclose()
        raise
    assert isinstance(first, Started)
    return first


async def _whole(form: _Form, parts: AsyncGenerator[Part, None]) -> dict[str, Any]:
    async with aclosing(parts):
        started = await anext(parts)
        assert isinstance(started, Started)
        form.begin(started)
        deltas = [form.read(part) async for part in parts]
    return form.whole([delta for delta in deltas if delta is not None])


async def _events(
    form: _Form, started: Started, parts: AsyncGenerator[Part, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(_patiently(parts)) as patient:
        form.begin(started)
        for chunk in form.opening():
            yield _event(chunk)
        try:
            async for part in patient:
                if part is None:
                    for told in started.progress:
                        yield b": %s %d %d\n\n" % (told[0].encode(), *told[1:])
                    continue
                delta = form.read(part)
                for chunk in [] if delta is None else form.chunks(delta):
                    yield _event(chunk)
        except Exception as error:
            yield _event(api_error(error).body())
        yield _DONE


async def _patiently(parts: AsyncGenerator[Part, None]) -> AsyncGenerator[Part | None, None]:
    """The parts, and None for each second in which there is none."""
    while True:
        step = asyncio.ensure_future(anext(parts, None))
        try:
            while not (await asyncio.wait({step}, timeout=_PATIENCE))[0]:
                yield None
            part = step.result()
        finally:
            await ended(step)
        if part is None:
            return
        yield part


def _event(body: dict[str, Any]) -> bytes:
    # ASCII, as some clients take U+2028 or U+0085 for the end of a line.
    return b"data: " + json.dumps(body).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """Server-sent events, whose generators are closed with the connection.

    Args:
        events: the events.
        parts: what they are made of; closed too, as a client may leave before the first event.
        left: function that is called if the client leaves before the last.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        parts: AsyncGenerator[Part, None],
        left: Callable[[], None],
    ) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._events, self._parts, self._left = events, parts, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        ended = False

        async def observed(message: Message) -> None:
            nonlocal ended
            ended = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            await super().__call__(scope, receive, observed)
            if not ended:
                self._left()
        finally:
            await self._events.aclose()
            await self._parts.aclose()


class _Form:
    """Reads the parts of an answer, and writes them in the form of one endpoint.

    Args:
        service: the models.
        request: the request.
    """

    kind: str
    prefix: str

    def __init__(self, service: Service, request: Request) -> None:
        self.request, self.tokenizer = request, service.decoder.tokenizer
        self._service = service
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid4().hex}",
            "object": self.kind + (".chunk" if request.stream and self.chunked else ""),
            "created": int(time.time()),
            "model": service.name,
        }
        self.scored: Scored | None = None

    @property
    def chunked(self) -> bool:
        """Whether parts of a stream are another kind of object than a whole answer."""
        raise NotImplementedError

    def begin(self, started: Started) -> None:
        """Note what both models read."""
        self._prompts = started.prompts
        self._pieces = None
        if self.request.rapid.return_tokens:
            own = stop_strings(generation_config(self._service.decoder.target.model))
            stop = (*started.sampling.stop, *own)
            self._pieces = TextStream(self.tokenizer, stop)
        self._tokens: list[dict[str, Any]] = []

    def read(self, part: Part) -> ChatDelta | None:
        """Take a part; None for those that are no delta."""
        if isinstance(part, Scored):
            self.scored = part
            return None
        assert isinstance(part, ChatDelta)
        return part

    def tokens(self, delta: ChatDelta) -> dict[str, Any]:
        """The tokens of a delta, if they were asked for."""
        if self._pieces is None:
            return {}
        pieces = [self._pieces.push(token) for token in delta.token_ids]
        if delta.finish_reason is not None and pieces:
            pieces[-1] += self._pieces.finish()
        told = [
            {"id": token, "text": piece, "origin": origin}
            for token, piece, origin in zip_longest(delta.token_ids, pieces, delta.origins)
        ]
        return {"tokens": told, "stats": delta.stats.as_dict()}

    def rapid(self, stats: Stats) -> dict[str, Any]:
        """Statistics, and where the retrieved chunks stand."""
        return {"stats": stats.as_dict(), **self._prompts.report()}

    def object(self, choice: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
        """An answer or a part of one."""
        choices = [] if choice is None else [{"index": 0, **choice}]
        return {**self._head, "choices": choices, **more}

    def chunks(self, delta: ChatDelta) -> list[dict[str, Any]]:
        """What a stream says of a delta: nothing of one that holds text or a call back."""
        last = delta.finish_reason is not None
        told = self.tokens(delta)
        part = self.part(delta)
        if not (last or told or any(part.values())):
            return []
        choice = part | {"finish_reason": delta.finish_reason}
        if self.request.scored is not None:
            choice["logprobs"] = self.logprobs() if last else None
        more: dict[str, Any] = {}
        if told or last:
            more["rapid"] = told | (self.rapid(delta.stats) if last else {})
        options = self.request.stream_options
        counted = options is not None and options.include_usage
        if counted:
            more["usage"] = None
        made = [self.object(choice, **more)]
        if last and counted:
            made.append(self.object(None, usage=usage(delta.stats)))
        return made

    def whole(self, deltas: Sequence[ChatDelta]) -> dict[str, Any]:
        """A finished answer."""
        told = [token for delta in deltas for token in self.tokens(delta).get("tokens", ())]
        answer = ChatAnswer.from_deltas(deltas)
        choice = self.answer(answer) | {"finish_reason": answer.finish_reason}
        choice["logprobs"] = None if self.request.scored is None else self.logprobs()
        rapid = self.rapid(answer.stats)
        if self._pieces is not None:
            rapid["tokens"] = told
        return self.object(choice, usage=usage(answer.stats), rapid=rapid)

    def opening(self) -> list[dict[str, Any]]:
        """What a stream says before the first token."""
        return []

    def part(self, delta: ChatDelta) -> dict[str, Any]:
        """A delta as a choice has it."""
        raise NotImplementedError

    def answer(self, answer: ChatAnswer) -> dict[str, Any]:
        """A finished answer as a choice has it."""
        raise NotImplementedError

    def logprobs(self) -> dict[str, Any]:
        """Probabilities of all tokens."""
        raise NotImplementedError

    def text_of(self, token_id: int) -> str:
        """Text of a token by itself; its name in the vocabulary where it is part of a character."""
        text = self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        if _INCOMPLETE in text:
            text = self.tokenizer.convert_ids_to_tokens(token_id)
        return text


class _Chat(_Form):
    kind, prefix = "chat.completion", "chatcmpl"

    @property
    def chunked(self) -> bool:
        return True

    def opening(self) -> list[dict[str, Any]]:
        choice = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return [self.object(choice)]

    def part(self, delta: ChatDelta) -> dict[str, Any]:
        said: dict[str, Any] = {}
        if delta.content:
            said["content"] = delta.content
        if delta.reasoning_content:
            said["reasoning_content"] = delta.reasoning_content
        if delta.tool_calls:
            said["tool_calls"] = [
                {
                    "index": call.index,
                    **({} if call.id is None else {"id": call.id, "type": "function"}),
                    "function": {
                        **({} if call.name is None else {"name": call.name}),
                        "arguments": call.arguments,
                    },
                }
                for call in delta.tool_calls
            ]
        return {"delta": said}

    def answer(self, answer: ChatAnswer) -> dict[str, Any]:
        message = answer.message()
        if answer.tool_calls and not answer.content:
            message["content"] = None
        return {"message": message}

    def logprobs(self) -> dict[str, Any]:
        scored = () if self.scored is None else self.scored.logprobs
        return {"content": [self._entry(each) for each in scored], "refusal": None}

    def _entry(self, each: TokenLogprob) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in each.top]
        return self._token(each.token_id, each.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.text_of(token)
        whole = self.tokenizer.decode([token], clean_up_tokenization_spaces=False) == text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


class _Text(_Form):
    kind, prefix = "text_completion", "cmpl"

    @property
    def chunked(self) -> bool:
        return False

    def part(self, delta: ChatDelta) -> dict[str, Any]:
        return {"text": delta.content}

    def answer(self, answer: ChatAnswer) -> dict[str, Any]:
        return {"text": answer.content}

    def logprobs(self) -> dict[str, Any]:
        scored = () if self.scored is None else self.scored.logprobs
        texts = [self.text_of(each.token_id) for each in scored]
        return {
            "tokens": texts,
            "token_logprobs": [each.logprob for each in scored],
            "top_logprobs": [
                {self.text_of(token): logprob for token, logprob in each.top} for each in scored
            ],
            "text_offset": list(accumulate(map(len, texts), initial=0))[:-1],
        }


def usage(stats: Stats) -> dict[str, Any]:
    """Token counts of a request."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
    }
