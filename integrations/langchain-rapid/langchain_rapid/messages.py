"""LangChain's messages as the chat template's."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
)
from rapid_llm.errors import InvalidParameterError


def to_chat(messages: Sequence[BaseMessage]) -> list[dict[str, str]]:
    """Roles and texts for the model's chat template.

    Raises:
        InvalidParameterError: a message holds something else than text, or is a tool's.
    """
    return [{"role": _role(message), "content": text_of(message)} for message in messages]


def text_of(message: BaseMessage) -> str:
    """A message's text; its parts, if it has several, on lines of their own.

    Raises:
        InvalidParameterError: a part is no text.
    """
    if isinstance(message.content, str):
        return message.content
    texts: list[str] = []
    for part in message.content:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise InvalidParameterError(
                f"a {message.type} message has a part of type {part.get('type')!r}: this is a text "
                'model, send text or parts of the form {"type": "text", "text": ...}'
            )
    return "\n".join(texts)


def last_question(messages: Sequence[BaseMessage]) -> int:
    """Index of the last human message.

    Raises:
        InvalidParameterError: there is none.
    """
    for index in range(len(messages) - 1, -1, -1):
        if isinstance(messages[index], HumanMessage):
            return index
    raise InvalidParameterError(
        "the messages hold no human message, so there is no question for the retriever: add one"
    )


def _role(message: BaseMessage) -> str:
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, ChatMessage):
        return message.role
    if isinstance(message, AIMessage) and not (message.tool_calls or message.invalid_tool_calls):
        return "assistant"
    what = "with tool calls" if isinstance(message, AIMessage) else "is not supported"
    raise InvalidParameterError(
        f"{type(message).__name__} {what}: ChatRapid does not call tools; put their results into "
        "the text of a human message"
    )
