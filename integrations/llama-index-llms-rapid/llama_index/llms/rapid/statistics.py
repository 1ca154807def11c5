"""Statistics of answers in query and chat engines: ``response.metadata["rapid"]``.

A response synthesizer passes text to the LLM and does not share its response. LlamaIndex's spans
show when a synthesizer or chat engine begins, its nodes, and its response: calls in between, and
calls while a streaming response is read, belong to this response.
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
"""Classes and methods whose spans end with a response."""

_recording = ProcessLock()
_END = object()


class Report(dict[str, Any]):
    """Statistics of an answer's calls so far: ``Stats.as_dict()`` and the calls' notes.

    Statistics of several calls are added (see :meth:`rapid_llm.Stats.together`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[int, tuple[Stats, Mapping[str, Any]]] = {}
        self._response: Any = None  # response that does not have the report yet

    def record(self, call: int, stats: Stats, notes: Mapping[str, Any]) -> None:
        """Set the running totals of a call.

        Args:
            call: number of the call.
            stats: totals so far.
            notes: other values of the pipeline.
        """
        with _recording:
            self._calls[call] = stats, notes
            self.update(summary(list(self._calls.values())))
            self._show()

    def show_in(self, response: Any) -> None:
        """Set ``metadata["rapid"]`` of a response to this report, once a call is recorded."""
        self._response = response
        if self:
            self._show()

    def _show(self) -> None:
        if self._response is not None:
            # A StreamingAgentChatResponse has no such attribute.
            known = getattr(self._response, "metadata", None) or {}
            self._response.metadata = {"rapid": self, **known}
            self._response = None


def summary(calls: Sequence[tuple[Stats, Mapping[str, Any]]]) -> dict[str, Any]:
    """Statistics and notes of several calls, with lists joined and numbers added."""
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
    """An unfinished answer.

    Attributes:
        span: id of the span that ends with the answer.
        confidence: confidence of the retrieval; 1 where the span does not show the nodes.
        synthesized: whether a synthesizer makes it, all of whose calls belong to it.
        report: statistics of the answer's calls.
    """

    span: str
    confidence: float
    synthesized: bool
    report: Report = field(default_factory=Report)


_open: ContextVar[tuple[_Answer, ...]] = ContextVar("rapid_answers", default=())
"""Answers that calls of this thread or task belong to, the innermost last."""


def reports(*, filled: bool = False) -> tuple[Report, ...]:
    """Reports of the answers that the current call belongs to.

    Args:
        filled: whether the call answers a template without a context, which a chat engine fills
            before its answer, and a synthesizer for it.
    """
    answers = _open.get()
    if filled and not any(answer.synthesized for answer in answers):
        return ()
    return tuple(answer.report for answer in answers)


def retrieval_confidence() -> float:
    """Confidence of the retrieval for the current call; 1 if unknown."""
    return _open.get()[-1].confidence if _open.get() else 1.0


def confidence_of(nodes: Sequence[NodeWithScore]) -> float:
    """Confidence of a retrieval, in [0, 1] (see :func:`rapid_llm.context.confidence.confidence`).

    It is 1 unless every node has a score within [-1, 1], like a cosine similarity.
    """
    scores = [node.score for node in nodes if node.score is not None and -1 <= node.score <= 1]
    return confidence(scores) if scores and len(scores) == len(nodes) else 1.0


class _AnswerSpans(NullSpanHandler):
    """Span handler that opens a report when a response begins, and adds it to the response."""

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
            answer = _Answer(id_, sure, isinstance(instance, BaseSynthesizer))
            _open.set((*_open.get(), answer))

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
        """Close the answer of a span, and those opened within it; returns the answer."""
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
    """A stream of texts; calls made by its steps belong to ``answers``."""
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
    """Install the span handler that adds statistics to the responses of engines."""
    root = get_dispatcher()
    if not any(isinstance(handler, _AnswerSpans) for handler in root.span_handlers):
        root.add_span_handler(_AnswerSpans())
