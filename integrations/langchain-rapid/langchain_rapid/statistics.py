"""Statistics of answers: of one message, or of all calls of a chain or agent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any, cast

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import BaseTransformOutputParser
from langchain_core.outputs import ChatGeneration, Generation, LLMResult
from langchain_core.tracers.context import register_configure_hook
from rapid_llm.errors import InvalidParameterError
from rapid_llm.forked import ProcessLock
from rapid_llm.stats import Stats


@dataclass
class RapidStats(Stats):
    """The statistics of an answer, and what was retrieved for it.

    Attributes:
        model_name: name of the target.
        chunks: known ones of ``id``, ``document_id`` and ``start_index`` of each retrieved chunk.
    """

    model_name: str = ""
    chunks: list[dict[str, Any]] = field(default_factory=list)


def rapid_stats(answer: BaseMessage | Generation) -> RapidStats | None:
    """The statistics of an answer of ``ChatRapid`` or ``RapidLLM``.

    Args:
        answer: message of a ``ChatRapid``, or generation of either class; for a stream the sum of
            its chunks.

    Returns:
        The statistics; None where the answer is from another model, or not finished.
    """
    if isinstance(answer, ChatGeneration):
        answer = answer.message
    metadata = (
        answer.response_metadata
        if isinstance(answer, BaseMessage)
        else answer.generation_info or {}
    )
    known = metadata.get("rapid")
    if not isinstance(known, dict):
        return None
    names = {each.name for each in fields(RapidStats)}
    stats = {name: value for name, value in known.items() if name in names}
    return RapidStats(**stats, model_name=metadata.get("model_name", ""))


class MessageOutputParser(BaseTransformOutputParser[BaseMessage]):
    """Output parser that returns the model's message itself, with its metadata.

    For chains that return text otherwise:
    ``create_rapid_documents_chain(llm, prompt, documents=…, output_parser=MessageOutputParser())``.

    Raises:
        InvalidParameterError: the model is not a chat model, so that its answer is no message.
    """

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> BaseMessage:
        """The message of a generation."""
        (generation, *_) = result
        if not isinstance(generation, ChatGeneration):
            raise InvalidParameterError(
                "MessageOutputParser was given text, not a message: use it after a chat model such "
                "as ChatRapid; the statistics of a RapidLLM are in a RapidStatsCallbackHandler"
            )
        return generation.message

    def parse(self, text: str) -> BaseMessage:
        """Refuse a text, which has no metadata."""
        return self.parse_result([Generation(text=text)])


class RapidStatsCallbackHandler(BaseCallbackHandler):
    """Callback handler that collects the statistics of all calls of ``ChatRapid`` and ``RapidLLM``.

    Calls of other models, failed calls, and answers from LangChain's cache are left out.

    Example:
        ```python
        callback = RapidStatsCallbackHandler()
        chain.invoke(inputs, config={"callbacks": [callback]})
        callback.total.acceptance_ratio
        ```

    Attributes:
        calls: statistics of each finished call, in the order of their ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[RapidStats] = []
        self._around: RapidStatsCallbackHandler | None = None
        self._lock = ProcessLock()

    @property
    def total(self) -> Stats:
        """The sum of all calls (see :meth:`rapid_llm.Stats.together`)."""
        with self._lock:
            parts = [_plain(call) for call in self.calls]
        return Stats.together(parts) if parts else Stats()

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        """Collect the statistics of a call."""
        for generations in response.generations:
            for generation in generations:
                stats = None if _from_cache(generation) else rapid_stats(generation)
                if stats is not None:
                    self._add(stats)

    def _add(self, stats: RapidStats) -> None:
        with self._lock:
            self.calls.append(stats)
        if self._around is not None:
            self._around._add(stats)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.calls)} calls, {self.total})"


_current: ContextVar[RapidStatsCallbackHandler | None] = ContextVar("rapid_stats", default=None)
register_configure_hook(_current, inheritable=True)


@contextmanager
def get_rapid_stats_callback() -> Iterator[RapidStatsCallbackHandler]:
    """Context in which the statistics of all calls are collected, whatever chain makes them.

    LangChain's ``get_usage_metadata_callback`` for RAPID. A context within another one counts for
    both.

    Example:
        ```python
        with get_rapid_stats_callback() as callback:
            agent.invoke(inputs)
        callback.total.drafted_tokens, callback.total.draft_skipped
        ```

    Yields:
        The handler.
    """
    handler = RapidStatsCallbackHandler()
    handler._around = _current.get()
    token = _current.set(handler)
    try:
        yield handler
    finally:
        _current.reset(token)


def _plain(stats: Stats) -> Stats:
    return Stats(**{each.name: getattr(stats, each.name) for each in fields(Stats)})


def _from_cache(generation: Generation) -> bool:
    """Whether LangChain took a chat's answer from its cache, which sets its cost to 0."""
    message = generation.message if isinstance(generation, ChatGeneration) else None
    usage = message.usage_metadata if isinstance(message, AIMessage) else None
    return usage is not None and cast("dict[str, Any]", usage).get("total_cost") == 0
