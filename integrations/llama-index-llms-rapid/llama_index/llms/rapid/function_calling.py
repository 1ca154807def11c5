"""LlamaIndex's interface for tool calls, which programs, agents and selectors use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, ToolCallBlock
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool

from llama_index.llms.rapid.chats import as_openai_tool, taken_options
from rapid_llm.errors import InvalidParameterError


class ToolCalls(FunctionCallingLLM):
    """An LLM whose ``chat`` takes tools in OpenAI's form."""

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of ``chat``, checked before a model is loaded.

        Args:
            tools: tools of LlamaIndex, or dicts in OpenAI's form.
            user_msg: message after the history.
            chat_history: messages before it.
            verbose: argument of LlamaIndex without effect.
            allow_parallel_tool_calls: whether an answer may hold several calls.
            tool_required: whether the answer must be a call.
            tool_choice: ``auto``, ``required``, ``none``, the name of a tool that must be called,
                or a choice in OpenAI's form; None follows ``tool_required``.
            kwargs: other arguments of ``chat``.

        Raises:
            InvalidParameterError: a tool or the choice is malformed.
        """
        messages = list(chat_history or ())
        if isinstance(user_msg, str):
            user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
        if user_msg is not None:
            messages.append(user_msg)
        if tool_choice is None and tool_required:
            tool_choice = "required"
        asked = {
            "tools": [as_openai_tool(tool) for tool in tools],
            "tool_choice": tool_choice,
            "parallel_tool_calls": allow_parallel_tool_calls,
        }
        taken_options({**asked, "response_format": kwargs.get("response_format")})
        return {"messages": messages, **asked, **kwargs}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls of an answer, with the arguments so far while it is streaming.

        Raises:
            InvalidParameterError: the answer was cut within a call, or calls no tool while
                ``error_on_no_tool_call`` is set.
        """
        blocks = [b for b in response.message.blocks if isinstance(b, ToolCallBlock)]
        if not blocks and error_on_no_tool_call:
            raw = response.raw if isinstance(response.raw, dict) else {}
            reason = ": the answer was cut, raise max_tokens"
            raise InvalidParameterError(
                "the answer calls no tool"
                + (reason if raw.get("finish_reason") == "length" else ", and a call was expected")
            )
        return [
            ToolSelection(
                tool_id=block.tool_call_id or "",
                tool_name=block.tool_name,
                tool_kwargs=_arguments(block),
            )
            for block in blocks
        ]


def _arguments(block: ToolCallBlock) -> dict[str, Any]:
    if isinstance(block.tool_kwargs, dict):
        return block.tool_kwargs
    try:
        known = json.loads(block.tool_kwargs)
    except ValueError as error:
        raise InvalidParameterError(
            f"the answer was cut before the call of {block.tool_name!r} was complete: raise "
            "max_tokens, or leave out the stop string that it contains"
        ) from error
    return known if isinstance(known, dict) else {}
