"""Convert LangChain's tools and response formats to OpenAI's form, and answers to its messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.tool import invalid_tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from rapid_llm.errors import InvalidParameterError

from langchain_rapid.answers import response_metadata, usage

if TYPE_CHECKING:
    from rapid_llm.tools.answers import ChatDelta
    from rapid_llm.tools.calls import ToolCallDelta
    from rapid_llm.tools.definitions import ChatOptions

    from langchain_rapid.options import Call

ARGUMENTS = ("tools", "tool_choice", "parallel_tool_calls", "response_format")
"""Arguments of a call for tools and the response format."""

_IGNORED = ("strict", "ls_structured_output_format", "structured_output_format")
"""Arguments that LangChain adds; every schema is enforced strictly."""


def as_openai_tools(
    tools: Sequence[Mapping[str, Any] | type | Callable[..., Any] | BaseTool],
    strict: bool | None = None,
) -> list[dict[str, Any]]:
    """Convert tools of any kind that LangChain knows to OpenAI's form.

    Raises:
        InvalidParameterError: one of them is not a tool.
    """

    def formatted(tool: Any) -> dict[str, Any]:
        try:
            return convert_to_openai_tool(tool, strict=strict)
        except (TypeError, ValueError) as error:
            raise InvalidParameterError(
                f"{tool!r} is no tool ({error}): pass a tool, a function with a docstring, a "
                "pydantic class, a TypedDict or a schema with a name"
            ) from error

    return [formatted(tool) for tool in tools]


def as_openai_choice(choice: Any) -> Any:
    """Convert LangChain's ``tool_choice``: ``any`` and True to ``required``, False to ``none``."""
    if choice is True or choice == "any":
        return "required"
    if choice is False:
        return "none"
    if isinstance(choice, Mapping) and isinstance(choice.get("name"), str):
        return choice["name"]  # Anthropic's form
    return choice


def taken_options(arguments: dict[str, Any]) -> ChatOptions:
    """Remove tools and response format from the arguments of a call, and return them.

    Raises:
        InvalidParameterError: they are malformed, or exclude each other.
    """
    from rapid_llm.tools.definitions import ChatOptions

    for name in _IGNORED:
        arguments.pop(name, None)
    given = {name: arguments.pop(name) for name in ARGUMENTS if name in arguments}
    given = {name: value for name, value in given.items() if value is not None}
    tools = given.get("tools")
    if isinstance(tools, Sequence) and not isinstance(tools, str):
        given["tools"] = as_openai_tools(tools)
    if "tool_choice" in given:
        given["tool_choice"] = as_openai_choice(given["tool_choice"])
    return ChatOptions(**given)


def generation_chunk(
    delta: ChatDelta, call: Call, calls: Sequence[ToolCallDelta]
) -> ChatGenerationChunk:
    """Convert a delta of an answer to a chunk of a message.

    Args:
        delta: the delta.
        call: options and retrieval of the answer.
        calls: additions to the answer's tool calls so far, the delta's own included.
    """
    fields: dict[str, Any] = {
        "content": delta.content,
        "tool_call_chunks": [
            tool_call_chunk(name=each.name, args=each.arguments, id=each.id, index=each.index)
            for each in delta.tool_calls
        ],
    }
    if delta.reasoning_content:
        fields["additional_kwargs"] = {"reasoning_content": delta.reasoning_content}
    if delta.finish_reason is not None:
        fields |= {
            "response_metadata": response_metadata(delta, call) | _cut_call(calls),
            "usage_metadata": usage(delta.stats),
            "chunk_position": "last",
        }
    return ChatGenerationChunk(message=AIMessageChunk(**fields))


def says_something(delta: ChatDelta) -> bool:
    """Whether a delta has any content for a chunk."""
    return bool(delta.content or delta.reasoning_content or delta.tool_calls or delta.finish_reason)


def _cut_call(calls: Sequence[ToolCallDelta]) -> dict[str, Any]:
    """Metadata that tells the arguments of a call within which the answer was cut."""
    from rapid_llm.tools.answers import joined_calls

    *_, last = joined_calls(calls) or (None,)
    if last is None or is_json(last.arguments):
        return {}
    return {"cut_tool_call": {"id": last.id, "args": last.arguments}}


def with_cut_calls(result: ChatResult) -> ChatResult:
    """A result whose tool calls that were cut are invalid; LangChain has completed their JSON."""
    return result.model_copy(update={"generations": [*map(_with_cut_call, result.generations)]})


def _with_cut_call(generation: ChatGeneration) -> ChatGeneration:
    message = generation.message
    if not isinstance(message, AIMessage) or "cut_tool_call" not in message.response_metadata:
        return generation
    cut = message.response_metadata["cut_tool_call"]
    invalid = [
        invalid_tool_call(
            name=call["name"],
            **cut,
            error="the answer was cut before the call was complete: raise max_tokens, or leave "
            "out the stop string that it contains",
        )
        for call in [*message.tool_calls, *message.invalid_tool_calls]
        if call["id"] == cut["id"]
    ]
    whole = [call for call in message.tool_calls if call["id"] != cut["id"]]
    changes = {"tool_calls": whole, "invalid_tool_calls": invalid}
    return generation.model_copy(update={"message": message.model_copy(update=changes)})


def is_json(text: str) -> bool:
    """Whether a text is complete JSON."""
    try:
        json.loads(text)  # a call without arguments has {}
    except ValueError:
        return False
    return True
