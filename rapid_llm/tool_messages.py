"""Adapt tools, earlier calls and their results in chat messages to a chat template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rapid_llm.errors import InvalidParameterError
from rapid_llm.tool_formats import (
    SMOLLM2,
    ToolFormat,
    format_of,
    keeps_calls,
    variable_of,
    wants_short_ids,
)

_SYSTEM = ("system", "developer")
_SHORT = re.compile(r"[A-Za-z0-9]{9}")


def checked_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose calls have objects as arguments: templates write them as JSON.

    OpenAI's form has the JSON text of the arguments. A text that is no JSON object is kept.

    Raises:
        InvalidParameterError: ``tool_calls`` is no list of calls.
    """
    calls = message.get("tool_calls")
    if calls is None:
        return dict(message)
    if not isinstance(calls, list | tuple) or not all(isinstance(c, Mapping) for c in calls):
        raise InvalidParameterError(
            f"tool_calls={calls!r} of a message of the role {message['role']!r} is not allowed: "
            'pass a list of calls, as {"id": …, "type": "function", "function": {"name": …, '
            '"arguments": …}}'
        )
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return dict(call)
    if not isinstance(arguments, Mapping):
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


def adapted(
    chat: Sequence[dict[str, Any]], variables: Mapping[str, Any], template: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and variables with which a template shows tools, earlier calls and their results.

    For a template that shows no tools, a system message lists them; for one that ignores earlier
    calls, they are written as text, and results as user messages. Text written here may contain
    control tokens; the content of messages must be quoted before.

    Args:
        chat: chat messages, their content text and their calls checked.
        variables: variables of the template; ``tools`` are the tools.
        template: the chat template.
    """
    chat, variables = list(chat), dict(variables)
    form, variable = format_of(template), variable_of(template)
    tools = variables.get("tools")
    if tools and form is not None and form.prompt is not None:
        del variables["tools"]
        if not all(isinstance(tool, Mapping) for tool in tools):
            raise InvalidParameterError(
                "the model's chat template shows no tools, so they are written into a system "
                "message, and one of them is no dict: pass tools in OpenAI's form"
            )
        written = "\n".join(json.dumps(t, ensure_ascii=False) for t in tools)
        chat = _with_system(chat, form.prompt.replace("{tools}", written))
    elif tools and variable == "xml_tools":
        variables["xml_tools"] = variables.pop("tools")
    if not any(m["role"] == "tool" or m.get("tool_calls") for m in chat):
        return chat, variables
    if keeps_calls(template):
        return (_with_short_ids(chat) if wants_short_ids(template) else chat), variables
    return _as_text(chat, form or SMOLLM2), variables


def one_call_each(chat: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of one call each, followed by its result, for templates that take no more."""
    placed: list[dict[str, Any]] = []
    waiting: list[tuple[Any, int]] = []  # ids of calls without a result, and where it belongs
    for message in chat:
        if message["role"] == "tool":
            # Ids are the models' own: some write none, or the same ones in each answer.
            own = message.get("tool_call_id")
            fits = (n for n, (call, _) in enumerate(waiting) if None in (call, own) or call == own)
            _, place = waiting.pop(n) if (n := next(fits, None)) is not None else (0, len(placed))
            placed.insert(place, message)
            waiting = [(call, at + (at >= place)) for call, at in waiting]
            continue
        calls = message.get("tool_calls") or ()
        waiting = []
        if len(calls) <= 1:
            placed.append(message)
            continue
        for number, call in enumerate(calls):
            content = "" if number else message["content"]
            placed.append({**message, "content": content, "tool_calls": [call]})
            waiting.append((call.get("id"), len(placed)))
    return placed


def _with_system(chat: list[dict[str, Any]], prompt: str) -> list[dict[str, Any]]:
    """The chat with a text at the end of its first system message."""
    if chat and chat[0]["role"] in _SYSTEM:
        own = chat[0]["content"]
        content = f"{own}\n\n{prompt}" if own else prompt
        return [{**chat[0], "content": content}, *chat[1:]]
    return [{"role": "system", "content": prompt}, *chat]


def _with_short_ids(chat: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    def short(given: Any) -> str:
        known = isinstance(given, str) and _SHORT.fullmatch(given)
        return given if known else hashlib.sha256(str(given).encode()).hexdigest()[:9]

    adapted = []
    for message in chat:
        message = dict(message)
        if message["role"] == "tool":
            message["tool_call_id"] = short(message.get("tool_call_id"))
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [{**call, "id": short(call.get("id"))} for call in calls]
        adapted.append(message)
    return adapted


def _as_text(chat: Sequence[dict[str, Any]], form: ToolFormat) -> list[dict[str, Any]]:
    adapted: list[dict[str, Any]] = []
    answering = False  # whether the last message holds results
    for message in chat:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if answering:
                adapted[-1]["content"] += f"\n{result}"
            else:
                adapted.append({"role": "user", "content": result})
            answering = True
            continue
        answering = False
        if calls := message.get("tool_calls"):
            functions = [call.get("function", call) for call in calls]
            text = form.write(
                [{"name": f.get("name"), "arguments": f.get("arguments", {})} for f in functions]
            )
            content = "\n".join(filter(None, (message["content"], text)))
            message = {**message, "content": content}
        adapted.append(message)
    return adapted
