"""What an answer cost, as query and chat engines show it: ``response.metadata["rapid"]``.

A response synthesizer hands the LLM text and keeps the response to itself. LlamaIndex's spans tell
when a synthesizer or chat engine begins, with which nodes, and what it returns: the calls between
belong to this response.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.span_handlers import NullSpanHandler
from llama_index.core.response_synthesizers.base import BaseSynthesizer
from llama_index.core.schema import NodeWithScore

from rapid_llm.context.confidence import confidence
from rapid_llm.stats import Stats

_ANSWERING = (
    (BaseSynthesizer, ("synthesize", "asynthesize")),
    (BaseChatEngine, ("chat", "achat", "stream_chat", "astream_chat")),
)
"""The spans that end with a response."""

_recording = threading.Lock()


class Report(dict[str, Any]):
    """The statistics of an answer's calls so far: ``Stats.as_dict()`` and the calls' notes.

    Those of several calls are added up (see :meth:`rapid_llm.Stats.together`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[int, tuple[Stats, Mapping[str, Any]]] = {}

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
        answer = self._closed(id_)
        if answer is not None and answer.report:
            # A StreamingAgentChatResponse has no such field of itself.
            known = getattr(result, "metadata", None) or {}
            result.metadata = {"rapid": answer.report, **known}  # type: ignore[union-attr]

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


def watch_engines() -> None:
    """Let responses of engines have their statistics from now on."""
    root = get_dispatcher()
    if not any(isinstance(handler, _AnswerSpans) for handler in root.span_handlers):
        root.add_span_handler(_AnswerSpans())
