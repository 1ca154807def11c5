"""Statistics of answers in query and chat engines: ``response.metadata["rapid"]``.

A response synthesizer hands the LLM text and keeps the response to itself. LlamaIndex's spans tell
when a synthesizer or chat engine begins, with which nodes, and what it returns: the calls between,
and those that are made while a streaming response is read, belong to this response.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.span_handlers import NullSpanHandler
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.schema import NodeWithScore

from rapid_llm.context.confidence import confidence
from rapid_llm.forked import ProcessLock
from rapid_llm.stats import Stats

_ANSWERING = (
    (BaseSynthesizer, ("synthesize", "asynthesize")),
    (BaseChatEngine, ("chat", "achat", "stream_chat", "astream_chat")),
)
"""The spans that end with a response."""

_recording = ProcessLock()
_END = object()


class Report(dict[str, Any]):
    """The statistics of an answer's calls so far: ``Stats.as_dict()`` and the calls' notes.

    Those of several calls are added up (see :meth:`rapid_llm.Stats.together`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[int, tuple[Stats, Mapping[str, Any]]] = {}
        self._response: Any = None  # that does not show it yet

    def record(self, call: int, stats: Stats, notes: Mapping[str, Any]) -> None:
        """Put a call's running totals in the place of its earlier ones.

        Args:
            call: its number.
            stats: its totals.
            notes: what the pipeline knows of it.
        """
        with _recording:
            self._calls[call] = stats, notes
            self.update(summary(list(self._calls.values())))
            self._show()

    def show_in(self, response: Any) -> None:
        """Be ``metadata["rapid"]`` of a response, from the first call on that is recorded."""
        self._response = response
        if self:
            self._show()

    def _show(self) -> None:
        if self._response is not None:
            # A StreamingAgentChatResponse has no such field of itself.
            known = getattr(self._response, "metadata", None) or {}
            self._response.metadata = {"rapid": self, **known}
            self._response = None


def summary(calls: Sequence[tuple[Stats, Mapping[str, Any]]]) -> dict[str, Any]:
    """Statistics and notes of calls: lists of ids are joined, numbers added."""
    shown = Stats.together([stats for stats, _ in calls]).as_dict()
    for _, notes in calls:
        for name, value in notes.items():
            if isinstance(value, list):
                shown[name] = list(dict.fromkeys([*shown.get(name, ()), *value]))
            else:
                shown[name] = shown.get(name, 0) + value
    return shown


@dataclass(frozen=True)
class _Answer:
    """An answer that is being made.

    Attributes:
        span: the id of the span that ends with it.
        confidence: of the retrieval; 1 where the span does not show the nodes.
        report: the statistics of its calls.
    """

    span: str
    confidence: float
    report: Report = field(default_factory=Report)


_open: ContextVar[tuple[_Answer, ...]] = ContextVar("rapid_answers", default=())
"""The answers that calls of this thread or task belong to, the innermost last."""


def reports() -> tuple[Report, ...]:
    """The reports of the answers that a call made now belongs to."""
    return tuple(answer.report for answer in _open.get())


def retrieval_confidence() -> float:
    """The confidence of the retrieval that a call made now answers from; 1 if it is not known."""
    return _open.get()[-1].confidence if _open.get() else 1.0


def confidence_of(nodes: Sequence[NodeWithScore]) -> float:
    """How sure a retrieval was, in [0, 1] (see :func:`rapid_llm.context.confidence.confidence`).

    It is 1 unless every node has a score within [-1, 1], as cosine similarities do.
    """
    scores = [node.score for node in nodes if node.score is not None and -1 <= node.score <= 1]
    return confidence(scores) if scores and len(scores) == len(nodes) else 1.0


class _AnswerSpans(NullSpanHandler):
    """Opens a report where a response begins, and puts it into the response where it ends."""

    def span_enter(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        parent_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        method = id_.partition(".")[2].partition("-")[0]  # Class.method-uuid
        if any(isinstance(instance, kind) and method in names for kind, names in _ANSWERING):
            nodes = bound_args.arguments.get("nodes")
            sure = 1.0 if nodes is None else confidence_of(nodes)
            _open.set((*_open.get(), _Answer(id_, sure)))

    def span_exit(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        result: Any | None = None,
        **kwargs: Any,
    ) -> None:
        answers = _open.get()
        answer = self._closed(id_)
        if answer is None or result is None:
            return
        answer.report.show_in(result)
        if isinstance(result, StreamingResponse) and result.response_gen is not None:
            result.response_gen = _read_within(answers, result.response_gen)
        elif isinstance(result, AsyncStreamingResponse):
            result.response_gen = _aread_within(answers, result.response_gen)

    def span_drop(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        err: BaseException | None = None,
        **kwargs: Any,
    ) -> None:
        self._closed(id_)

    def _closed(self, id_: str) -> _Answer | None:
        """The answer of a span, which is no longer open, nor what was opened within it."""
        answers = _open.get()
        for depth, answer in enumerate(answers):
            if answer.span == id_:
                _open.set(answers[:depth])
                return answer
        return None


@contextmanager
def _within(answers: tuple[_Answer, ...]) -> Generator[None, None, None]:
    token = _open.set(answers)
    try:
        yield
    finally:
        _open.reset(token)


def _read_within(
    answers: tuple[_Answer, ...], texts: Generator[str, None, None]
) -> Generator[str, None, None]:
    """A stream whose steps, and the calls that they make, belong to answers."""
    with closing(texts):
        while True:
            with _within(answers):
                text: Any = next(texts, _END)
            if text is _END:
                return
            yield text


async def _aread_within(
    answers: tuple[_Answer, ...], texts: AsyncGenerator[str, None]
) -> AsyncGenerator[str, None]:
    async with aclosing(texts):
        while True:
            with _within(answers):
                text: Any = await anext(texts, _END)
            if text is _END:
                return
            yield text


def watch_engines() -> None:
    """Let responses of engines have their statistics from now on."""
    root = get_dispatcher()
    if not any(isinstance(handler, _AnswerSpans) for handler in root.span_handlers):
        root.add_span_handler(_AnswerSpans())
