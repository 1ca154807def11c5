"""Convert LangChain's messages to messages of a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from rapid_llm.errors import InvalidParameterError

if TYPE_CHECKING:
    from langchain_rapid.options import Call

_REASONING = ("reasoning", "thinking", "redacted_thinking", "reasoning_content")
"""Types of message parts that hold a model's reasoning."""


_CALLS = ("tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "function_call")
"""Types of message parts that repeat the calls of an answer."""


def to_chat(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Messages in OpenAI's form for the model's chat template: roles, texts, reasoning, calls.

    Raises:
        InvalidParameterError: a message contains something other than text and tool calls.
    """
    return [_chat_message(message) for message in messages]


def text_of(message: BaseMessage) -> str:
    """Text of a message without reasoning, with a line for each part.

    Raises:
        InvalidParameterError: a part is not text.
    """
    if isinstance(message.content, str):
        return message.content
    texts: list[str] = []
    for part in message.content:
        if isinstance(part, str):
            texts.append(part)
        elif part.get("type") in ("text", "text-plain") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") in _CALLS and isinstance(message, AIMessage):
            continue
        elif part.get("type") not in _REASONING:
            raise InvalidParameterError(
                f"a {message.type} message has a part of type {part.get('type')!r}: this is a text "
                'model, send text or parts of the form {"type": "text", "text": ...}'
            )
    return "\n".join(texts)


def _chat_message(message: BaseMessage) -> dict[str, Any]:
    chat: dict[str, Any] = {"role": _role(message), "content": text_of(message)}
    if reasoning := _reasoning_of(message):
        chat["reasoning_content"] = reasoning
    if isinstance(message, ToolMessage):
        chat["tool_call_id"] = message.tool_call_id
        if message.name:
            chat["name"] = message.name
    if isinstance(message, AIMessage) and (calls := _calls_of(message)):
        chat["tool_calls"] = calls
    return chat


def _calls_of(message: AIMessage) -> list[dict[str, Any]]:
    """Calls of an answer; arguments that are not JSON are text."""
    calls = [*message.tool_calls, *message.invalid_tool_calls]
    return [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["name"], "arguments": call["args"] or {}},
        }
        for call in calls
    ]


def _reasoning_of(message: BaseMessage) -> str:
    parts = [part for part in message.content if isinstance(part, dict)]
    thoughts = [
        part.get("reasoning", part.get("thinking"))
        for part in parts
        if part.get("type") in _REASONING
    ]
    beside = message.additional_kwargs.get("reasoning_content")
    return "\n".join(text for text in (beside, *thoughts) if text and isinstance(text, str))


def documents_of(message: BaseMessage) -> list[Document]:
    """The documents that a tool returned, blank ones left out; none of any other message."""
    artifact = message.artifact if isinstance(message, ToolMessage) else None
    listed: list[Any] = list(artifact) if isinstance(artifact, list | tuple) else [artifact]
    if not all(isinstance(each, Document) for each in listed):
        return []
    return [document for document in listed if document.page_content.strip()]


def require_read(documents: Any, messages: Sequence[BaseMessage], call: Call) -> None:
    """Refuse a call that would silently leave out a model's ``documents=``.

    Raises:
        InvalidParameterError: nothing was retrieved for the call, and it has no tool to do so.
    """
    by_tools = call.chat.tools or any(isinstance(each, ToolMessage) for each in messages)
    if documents is not None and call.retrieved is None and not by_tools:
        raise InvalidParameterError(
            "documents= was given without retriever=, and no tool retrieves in this call: pass "
            "retriever=, or bind create_retriever_tool(..., "
            'response_format="content_and_artifact")'
        )


def search_query(messages: Sequence[BaseMessage]) -> str:
    """Query for a retriever: the user's last message and the two before it.

    Raises:
        InvalidParameterError: there is no such message, or a part of one is not text.
    """
    from rapid_llm.context.prompts import retrieval_query

    index = last_question(messages)
    earlier = [text_of(message) for message in messages[:index] if _is_users(message)]
    return retrieval_query(text_of(messages[index]), earlier)


def last_question(messages: Sequence[BaseMessage]) -> int:
    """Index of the user's last message.

    Raises:
        InvalidParameterError: there is none.
    """
    for index in range(len(messages) - 1, -1, -1):
        if _is_users(messages[index]):
            return index
    raise InvalidParameterError(
        "the messages hold no human message, so there is no question for the retriever: add one"
    )


def _is_users(message: BaseMessage) -> bool:
    return isinstance(message, HumanMessage | ChatMessage) and _role(message) == "user"


def _role(message: BaseMessage) -> str:
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, ChatMessage):
        return message.role
    if isinstance(message, AIMessage):
        return "assistant"
    if isinstance(message, ToolMessage):
        return "tool"
    raise InvalidParameterError(
        f"{type(message).__name__} is not supported: send human, system, AI and tool messages"
    )
