"""Questions about documents: the arguments of a question, validated, and its chat messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, get_args

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.context.prompts import retrieval_query, with_document
from rapid_llm.errors import InvalidParameterError
from rapid_llm.progress import StageProgress
from rapid_llm.stats import Method

if TYPE_CHECKING:
    from rapid_llm.encoding import Message

METHODS: tuple[Method, ...] = get_args(Method)
"""Methods of answering, see :attr:`rapid_llm.Stats.method`."""


@dataclass(frozen=True)
class Question:
    """Arguments of :meth:`rapid_llm.RapidPipeline.stream`, which describes them."""

    question: str
    method: Method = "rapid"
    _: KW_ONLY
    history: Sequence[Message] = ()
    sampling: SamplingParams | None = None
    speculation: SpeculationConfig | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    progress: StageProgress | None = None


@dataclass(frozen=True)
class CheckedQuestion:
    """A question with its history and all its options.

    Attributes:
        question: the question.
        history: earlier chat messages.
        sampling: sampling options.
        speculation: speculation options.
        variables: variables of the chat template.
    """

    question: str
    history: tuple[Message, ...]
    sampling: SamplingParams
    speculation: SpeculationConfig
    variables: Mapping[str, Any]

    @property
    def query(self) -> str:
        """Text to retrieve for: the question and the latest ones of the history."""
        users = [m for m in self.history if isinstance(m, Mapping) and m.get("role") == "user"]
        return retrieval_query(self.question, [str(message.get("content")) for message in users])

    def messages(self, text: str) -> list[Message]:
        """Chat messages of the conversation, with a text in the first one."""
        return with_document([*self.history, {"role": "user", "content": self.question}], text)


def require_method(method: str) -> None:
    """Validate the name of a method.

    Raises:
        InvalidParameterError: the method is unknown.
    """
    if method not in METHODS:
        raise InvalidParameterError(
            f"method={method!r} is unknown; choose one of {', '.join(METHODS)}"
        )


def checked_history(history: Sequence[Message]) -> tuple[Message, ...]:
    """The history, validated as far as the place of the documents depends on it.

    Raises:
        InvalidParameterError: it is no list, or does not begin with a user's message of text.
    """
    if isinstance(history, str | Mapping) or not isinstance(history, Iterable):
        raise InvalidParameterError(
            f"history of type {type(history).__name__} is not allowed: give a list of chat messages"
        )
    messages = tuple(history)
    first = messages[0] if messages else {"role": "user", "content": ""}
    if not isinstance(first, Mapping) or first.get("role") != "user":
        raise InvalidParameterError(
            f"history begins with {first!r}: begin with a user's message, as "
            "{'role': 'user', 'content': '…'}, which the documents are put into"
        )
    if not isinstance(first.get("content"), str):
        raise InvalidParameterError(
            f"history[0] has the content {first.get('content')!r}: give a str"
        )
    return messages
