"""Convert the decoder's deltas to LlamaIndex's responses, each with the answer so far."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ContentBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from pydantic_core import from_json

if TYPE_CHECKING:
    from rapid_llm.decoder import Delta
    from rapid_llm.tools.answers import AnswerStream
    from rapid_llm.tools.calls import ToolCall

Response = TypeVar("Response", CompletionResponse, ChatResponse)
"""Response type of LlamaIndex."""

_Response = TypeVar("_Response", CompletionResponse, ChatResponse, covariant=True)


class Reader(Protocol, Generic[_Response]):
    """Builds the responses of one answer, one per delta."""

    def push(self, delta: Delta, raw: dict[str, Any]) -> _Response:
        """Add a delta and return the response so far.

        Args:
            delta: delta of the decoder.
            raw: ``raw`` of the response.
        """


class TextReader:
    """Builds the responses of a completion."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, delta: Delta, raw: dict[str, Any]) -> CompletionResponse:
        """See :class:`Reader`."""
        self._text += delta.text
        return CompletionResponse(text=self._text, delta=delta.text, raw=raw)


class ChatReader:
    """Builds the responses of a chat: reasoning, text and tool calls.

    Args:
        stream: parser of reasoning and tool calls; None where the answer is only text.
    """

    def __init__(self, stream: AnswerStream | None = None) -> None:
        self._stream = stream
        self._text = self._thoughts = ""
        self._calls: dict[int, ToolCall] = {}

    def push(self, delta: Delta, raw: dict[str, Any]) -> ChatResponse:
        """See :class:`Reader`."""
        text, beside = delta.text, {}
        if self._stream is not None:
            part = self._stream.push(delta)
            text, raw = part.content, {**raw, "finish_reason": part.finish_reason}
            self._thoughts += part.reasoning_content
            if part.reasoning_content:
                beside["thinking_delta"] = part.reasoning_content
            self._add(part.tool_calls)
        self._text += text
        message = self._message(finished=raw["finish_reason"] is not None)
        return ChatResponse(message=message, delta=text, raw=raw, additional_kwargs=beside)

    def _add(self, calls: Any) -> None:
        from rapid_llm.tools.calls import ToolCall

        for each in calls:
            call = self._calls.get(each.index) or ToolCall(each.id or "", each.name or "", "")
            self._calls[each.index] = replace(call, arguments=call.arguments + each.arguments)

    def _message(self, *, finished: bool) -> ChatMessage:
        blocks: list[ContentBlock] = []
        if self._thoughts:
            blocks.append(ThinkingBlock(content=self._thoughts))
        if self._text or not self._calls:
            blocks.append(TextBlock(text=self._text))
        calls = self._calls.values()
        blocks += [
            ToolCallBlock(
                tool_call_id=call.id, tool_name=call.name, tool_kwargs=arguments(call, finished)
            )
            for call in calls
        ]
        # LlamaIndex's programs read the calls of a stream from here.
        known = {"tool_calls": [as_openai(call) for call in calls]} if calls else {}
        return ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks, additional_kwargs=known)


def as_openai(call: ToolCall) -> dict[str, Any]:
    """A call in OpenAI's form."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def arguments(call: ToolCall, finished: bool) -> dict[str, Any] | str:
    """The arguments of a call so far; text where the answer is finished and they are not."""
    if finished:
        try:
            json.loads(call.arguments)
        except ValueError:
            return call.arguments
    known = from_partial_json(call.arguments)
    return known if isinstance(known, dict) else {}


def from_partial_json(text: str) -> Any:
    """Value of an incomplete JSON text; None where it has no value yet."""
    try:
        return from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return None
