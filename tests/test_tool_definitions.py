"""Wrong tools and contradictory options are told in one line, before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from rapid_llm.errors import InvalidParameterError
from rapid_llm.tools.definitions import ChatOptions, closed

OBJECT: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": OBJECT}}


def tool(name: Any = "add", parameters: Any = OBJECT, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def nested(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        made = {"type": "object", "properties": {"a": made}}
    return made


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tools": "add"}, r"tools of type str are not allowed: pass a list"),
        ({"tools": tool()}, r"tools of type dict are not allowed: pass a list"),
        ({"tools": [tool(), "add"]}, r"tools\[1\] is not allowed: a tool has the form"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\] is not allowed"),
        ({"tools": [{"function": {}}]}, r"tools\[0\] has the name None: give it a name"),
        ({"tools": [tool("")]}, r"tools\[0\] has the name ''"),
        ({"tools": [tool("a b")]}, r"has the name 'a b'"),
        ({"tools": [tool("none")]}, r"the name 'none', which is a value of tool_choice"),
        ({"tools": [tool(), tool(parameters={})]}, r"two tools have the name 'add'"),
        ({"tools": [tool(description=3)]}, r"description of the tool 'add' is of type int"),
        ({"tools": [tool(parameters="none")]}, r"parameters of the tool 'add' is of type str"),
        ({"tools": [tool(parameters={"type": "array"})]}, r"are of the type 'array'"),
        ({"tools": [tool(parameters={"properties": [1]})]}, r"parameters of the tool 'add'"),
        (
            {"tools": [tool(parameters={"properties": {"a": {"type": "integre"}}})]},
            r"parameters of the tool 'add'.*integre",
        ),
        (
            {"tools": [tool(parameters={"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#"}}})]},
            r"parameters of the tool 'add'.*look for a \$ref",
        ),
        ({"tools": [tool(parameters={"$ref": "#/$defs/b"})]}, r"'/\$defs/b' does not exist"),
        (
            {"tools": [tool(parameters={"properties": {"a": {"$ref": "https://x.org/a"}}})]},
            r"'https://x.org/a' is not present",
        ),
        (
            {"tools": [tool(parameters={"properties": {"a": {"enum": []}}, "required": ["a"]})]},
            r"the tool 'add'.*Unsatisfiable",
        ),
        ({"tools": [tool(parameters=nested(3_000))]}, r"the tool 'add'.*levels deep"),
        ({"tools": [tool()], "tool_choice": "sub"}, r"tool_choice='sub' names no tool; .* add"),
        ({"tools": [tool()], "tool_choice": ""}, r"tool_choice='' names no tool; .* add"),
        ({"tools": [tool()], "tool_choice": 3}, r"tool_choice=3 names no tool; .* add"),
        (
            {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "sub"}}},
            r"tool_choice='sub' names no tool",
        ),
        ({"tools": [tool()], "tool_choice": {"type": "x"}}, r"tool_choice=.* names no tool"),
        ({"tool_choice": "required"}, r"tool_choice='required' was given without tools"),
        ({"tools": [tool()], "parallel_tool_calls": 2}, r"parallel_tool_calls=2 is not allowed"),
        ({"response_format": {"type": "xml"}}, r"response_format=.* is not allowed"),
        ({"response_format": "json"}, r"response_format='json' is not allowed"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"schema": OBJECT}}},
            r"of the type 'json_object' has a 'json_schema', which it does not take",
        ),
        ({"response_format": {"type": "text", "schema": OBJECT}}, r"'text' has a 'schema'"),
        ({"response_format": {**SCHEMA, "schema": OBJECT}}, r"'json_schema' has a 'schema'"),
        ({"response_format": {"type": "json_object", "schema": 3}}, r"schema is of type int"),
        ({"response_format": {"type": "json_schema"}}, r"is of type NoneType, which is no JSON"),
        (
            {"tools": [tool()], "tool_choice": "add", "response_format": SCHEMA},
            r"tool_choice='add' makes the model call a tool, so that no text is left",
        ),
    ],
)
def test_what_is_wrong_is_told_in_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidParameterError, match=says) as caught:
        ChatOptions(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "choice", "callable_names", "must"),
    [
        ({}, "none", [], False),
        ({"tools": []}, "none", [], False),
        ({"tools": [tool(), tool("sub")]}, "auto", ["add", "sub"], False),
        ({"tools": [tool(), tool("sub")], "tool_choice": "none"}, "none", [], False),
        (
            {"tools": [tool(), tool("sub")], "tool_choice": "required"},
            "required",
            ["add", "sub"],
            True,
        ),
        ({"tools": [tool(), tool("sub")], "tool_choice": "sub"}, "sub", ["sub"], True),
        ({"tools": [tool()], "tool_choice": {"function": {"name": "add"}}}, "add", ["add"], True),
        ({"tools": [tool()], "response_format": SCHEMA}, "auto", ["add"], False),
    ],
)
def test_a_choice_says_which_tools_may_be_called(
    options: dict[str, Any], choice: str, callable_names: list[str], must: bool
) -> None:
    checked = ChatOptions(**options)
    assert checked.tool_choice == choice
    assert [each.name for each in checked.callable_tools] == callable_names
    assert checked.must_call is must


def test_a_tool_without_parameters_or_description_is_complete_for_the_template() -> None:
    (shown,) = ChatOptions(
        [{"type": "function", "function": {"name": "now"}}]
    ).template_variables()["tools"]
    function = {
        "name": "now",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    }
    assert shown == {"type": "function", "function": function}


def test_tools_that_may_not_be_called_are_still_shown() -> None:
    options = ChatOptions([tool()], tool_choice="none")
    assert [each["function"]["name"] for each in options.template_variables()["tools"]] == ["add"]
    assert ChatOptions().template_variables() == {}


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_object", "schema": OBJECT}, OBJECT),
        ({"type": "text", "json_schema": None}, None),
        (SCHEMA, OBJECT),
    ],
)
def test_a_response_format_is_a_schema(given: Any, schema: Any) -> None:
    assert ChatOptions(response_format=given).schema == schema


def test_a_tool_that_is_given_twice_is_one() -> None:
    titled = {**OBJECT, "title": "Add", "properties": {"a": {"type": "integer", "title": "A"}}}
    (only,) = ChatOptions([tool(), tool(parameters=titled)]).checked_tools
    assert only.parameters == OBJECT


def test_objects_of_a_schema_are_closed_where_they_do_not_say_otherwise() -> None:
    inner = {"type": "object", "properties": {"properties": {"type": "null"}}}
    schema = {
        "properties": {"a": inner, "b": {**inner, "additionalProperties": True}},
        "items": {"anyOf": [inner, {"type": "object"}]},
        "allOf": [inner],
        "$defs": {"c": inner},
    }
    shut = {**inner, "additionalProperties": False}
    assert closed(schema) == {
        "properties": {"a": shut, "b": {**inner, "additionalProperties": True}},
        "items": {"anyOf": [shut, {"type": "object"}]},
        "allOf": [inner],
        "$defs": {"c": shut},
    }
    undescribed = {**inner, "required": ["b"]}
    assert closed(undescribed) == undescribed
