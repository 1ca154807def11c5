"""Tools, tool choice and response format of a call, validated before anything is loaded.

All are given in the form of OpenAI's chat completions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rapid_llm.errors import InvalidParameterError
from rapid_llm.grammars import ANY_OBJECT, inline_json

MODES = ("auto", "none", "required")
"""Values of ``tool_choice`` beside the name of a tool."""

_NAME = re.compile(r"[A-Za-z0-9_.:-]+")
_OPEN = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties", "if",
                   "propertyNames", "allOf", "anyOf", "oneOf", "not", "$ref"})  # fmt: skip
_FORMATS = ("text", "json_object", "json_schema")


@dataclass(frozen=True)
class Tool:
    """A tool as the model sees it.

    Attributes:
        name: name of the function.
        parameters: JSON schema of its arguments, an object. Arguments that it does not name are
            not allowed, see :func:`closed`.
        definition: the tool in OpenAI's form, as prompts show it.
    """

    name: str
    parameters: Mapping[str, Any]
    definition: Mapping[str, Any]


@dataclass(frozen=True)
class ChatOptions:
    """Tools and response format of a call.

    Args:
        tools: tools in OpenAI's form, ``{"type": "function", "function": {"name": …, "description":
            …, "parameters": JSON schema}}``. None and an empty list are no tools.
        tool_choice: ``auto`` lets the model choose, ``required`` makes it call a tool, ``none``
            keeps it from calling one; the name of a tool, or ``{"type": "function", "function":
            {"name": …}}``, makes it call that tool. None is ``auto`` where there are tools.
        parallel_tool_calls: whether an answer may hold several calls.
        response_format: format of an answer in text: ``{"type": "json_schema", "json_schema":
            {"schema": …}}``, ``{"type": "json_object"}``, ``{"type": "text"}`` or None. As
            llama.cpp has it, ``json_object`` may have a ``schema``.

    Attributes:
        checked_tools: the tools.
        schema: JSON schema of an answer in text; ``{}`` is any JSON, None is free text.

    Raises:
        InvalidParameterError: a tool has no name, a schema is no schema, ``tool_choice`` names an
            unknown tool, or the options exclude each other.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool = True
    response_format: Mapping[str, Any] | None = None
    checked_tools: tuple[Tool, ...] = field(init=False)
    schema: Mapping[str, Any] | None = field(init=False)

    def __post_init__(self) -> None:
        tools = _checked_tools(self.tools)
        schema = _checked_format(self.response_format)
        choice = _checked_choice(self.tool_choice, tools)
        if not isinstance(self.parallel_tool_calls, bool):
            raise InvalidParameterError(
                f"parallel_tool_calls={self.parallel_tool_calls!r} is not allowed: it is True "
                "(several calls in an answer) or False (one at most)"
            )
        if schema is not None and choice not in ("auto", "none"):
            raise InvalidParameterError(
                f"tool_choice={choice!r} makes the model call a tool, so that no text is left for "
                "response_format: leave one of them out, or pass tool_choice='auto'"
            )
        for name, value in (("checked_tools", tools), ("schema", schema), ("tool_choice", choice)):
            object.__setattr__(self, name, value)

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """Tools that the answer may call."""
        if self.tool_choice == "none":
            return ()
        if self.tool_choice in MODES:
            return self.checked_tools
        return tuple(tool for tool in self.checked_tools if tool.name == self.tool_choice)

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice not in ("auto", "none")

    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat template that show the tools to the model."""
        return (
            {"tools": [dict(tool.definition) for tool in self.checked_tools]} if self.tools else {}
        )


def closed(schema: Any) -> Any:
    """A schema whose objects allow only the properties that they name.

    Objects that already allow or forbid others, those that require one which they do not describe,
    and those combined by ``allOf`` and the like, are not changed.

    Args:
        schema: JSON schema.
    """
    if isinstance(schema, list | tuple):
        return [closed(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    for keyword in ("properties", "$defs", "definitions"):
        if isinstance(made.get(keyword), Mapping):
            made[keyword] = {name: closed(each) for name, each in made[keyword].items()}
    for keyword in ("items", "prefixItems", "anyOf", "oneOf"):
        if keyword in made:
            made[keyword] = closed(made[keyword])
    named, required = made.get("properties"), made.get("required") or ()
    if isinstance(named, Mapping) and not made.keys() & _OPEN and named.keys() >= set(required):
        made["additionalProperties"] = False
    return made


def check_schema(schema: Any, what: str) -> Mapping[str, Any]:
    """Validate a JSON schema.

    Args:
        schema: value to validate.
        what: name of the schema in errors.

    Raises:
        InvalidParameterError: it is no schema, or cannot be enforced; the message names the
            keyword.
        MissingDependencyError: llguidance is not installed.
    """
    if not isinstance(schema, Mapping):
        raise InvalidParameterError(
            f"{what} is of type {type(schema).__name__}, which is no JSON schema: pass a dict, as "
            '{"type": "object", "properties": {…}}'
        )
    try:
        inline_json(schema)
    except InvalidParameterError as error:
        raise InvalidParameterError(f"{what}: {error}") from error
    return schema


def _checked_tools(tools: Any) -> tuple[Tool, ...]:
    if tools is None:
        return ()
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise InvalidParameterError(
            f"tools of type {type(tools).__name__} are not allowed: pass a list of tools in "
            "OpenAI's form"
        )
    checked: dict[str, Tool] = {}
    for position, given in enumerate(tools):
        tool = _checked_tool(given, position)
        first = checked.setdefault(tool.name, tool)
        if _untitled(first.parameters) != _untitled(tool.parameters):
            raise InvalidParameterError(
                f"two tools have the name {tool.name!r}: give each tool a name of its own"
            )
    return tuple(checked.values())


def _untitled(schema: Any) -> Any:
    """A schema without titles, which differ between two descriptions of the same tool."""
    if isinstance(schema, Mapping):
        titled = isinstance(schema.get("title"), str)
        return {k: _untitled(v) for k, v in schema.items() if not (titled and k == "title")}
    return [_untitled(each) for each in schema] if isinstance(schema, list | tuple) else schema


def _checked_tool(given: Any, position: int) -> Tool:
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or given.get("type", "function") != "function":
        raise InvalidParameterError(
            f"tools[{position}] is not allowed: a tool has the form "
            '{"type": "function", "function": {"name": …, "parameters": JSON schema}}'
        )
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidParameterError(
            f"tools[{position}] has the name {name!r}: give it a name of letters, digits, _, -, . "
            "and :"
        )
    if name in MODES:
        raise InvalidParameterError(
            f"tools[{position}] has the name {name!r}, which is a value of tool_choice: give it "
            "another name"
        )
    description = function.get("description")
    if not isinstance(description, str | None):
        raise InvalidParameterError(
            f"the description of the tool {name!r} is of type {type(description).__name__}: pass "
            "text"
        )
    what = f"the parameters of the tool {name!r}"
    parameters = function.get("parameters")
    parameters = dict(check_schema({} if parameters is None else parameters, what))
    if parameters.setdefault("type", "object") != "object":
        raise InvalidParameterError(
            f"{what} are of the type {parameters['type']!r}: arguments are an object, pass "
            '{"type": "object", "properties": {…}}'
        )
    check_schema(parameters, what)  # as the objects that they are
    parameters.setdefault("properties", {})
    definition = {
        "type": "function",
        "function": {
            **function,
            "name": name,
            "description": description or "",
            "parameters": parameters,
        },
    }
    return Tool(name, parameters, definition)


def _checked_choice(choice: Any, tools: tuple[Tool, ...]) -> str:
    if choice is None:
        return "auto" if tools else "none"
    if isinstance(choice, Mapping):
        function = choice.get("function")
        choice = function.get("name") if isinstance(function, Mapping) else choice
    names = [tool.name for tool in tools]
    if isinstance(choice, str) and (choice in MODES or choice in names):
        if choice != "none" and not tools:
            raise InvalidParameterError(
                f"tool_choice={choice!r} was given without tools: pass tools, or leave it out"
            )
        return choice
    known = f"; the tools are {', '.join(names)}" if names else ", and there are no tools"
    raise InvalidParameterError(
        f"tool_choice={choice!r} names no tool{known}: pass one of their names, or one of "
        f"{', '.join(MODES)}"
    )


def _checked_format(given: Any) -> Mapping[str, Any] | None:
    """JSON schema of a response format; None for text."""
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind not in _FORMATS:
        raise InvalidParameterError(
            f"response_format={given!r} is not allowed: pass {{'type': 'json_schema', "
            "'json_schema': {'schema': …}}, {'type': 'json_object'} or {'type': 'text'}"
        )
    place = {"json_schema": "json_schema", "json_object": "schema"}.get(kind)
    for key in ("json_schema", "schema"):
        if key != place and given.get(key) is not None:
            raise InvalidParameterError(
                f"response_format of the type {kind!r} has a {key!r}, which it does not take: pass "
                "{'type': 'json_schema', 'json_schema': {'schema': …}}"
            )
    if kind == "text":
        return None
    schema = given.get(place)
    if kind == "json_object":
        return ANY_OBJECT if schema is None else check_schema(schema, "response_format's schema")
    schema = schema.get("schema") if isinstance(schema, Mapping) else None
    return check_schema(schema, "response_format's json_schema.schema")
