"""What an answer with tools may be: checked token by token on the packaged model's tokenizer."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from conftest import installed, smollm2

from rapid_llm.grammars import llguidance_grammar
from rapid_llm.tool_formats import (
    GEMMA,
    GRANITE,
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMED,
    SMOLLM2,
    Reasoning,
    ToolFormat,
)
from rapid_llm.tools.definitions import ChatOptions
from rapid_llm.tools.grammar import answer_constraint

llguidance = installed("llguidance")

THINK = Reasoning("<think>", "</think>")
ADD = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "p": {"$ref": "#/$defs/P"}},
    "required": ["x"],
    "$defs": {"P": {"type": "object", "properties": {"n": {"type": "null"}}}},
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": ADD}},
    {"type": "function", "function": {"name": "now.utc-0"}},
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
RESPONSE = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
CALLS = {
    "hermes": [
        '<tool_call>\n{"name": "add", "arguments": {"x": 3}}\n</tool_call>',
        '<tool_call>{"name":"now.utc-0","arguments":{}}</tool_call>',
    ],
    "smollm2": [
        '<tool_call>[{"name": "add", "arguments": {"x": 3, "p": {"n": null}}}]</tool_call>'
    ],
    "llama": [
        '{"name": "add", "parameters": {"x": 3}}',
        '<|python_tag|>{"name": "now.utc-0", "parameters": {}}',
        '\n{ "name" : "add", "parameters": {"x": 3}}',
    ],
    "mistral": [
        '[TOOL_CALLS] [{"name": "add", "arguments": {"x": 3}}]',
        '[TOOL_CALLS][{"name": "add", "arguments": {"x": 3}, "id": "abcdefghi"}]',
    ],
    "mistral-named": ['[TOOL_CALLS]add[ARGS]{"x": 3}', "[TOOL_CALLS]now.utc-0[ARGS] {}"],
    "gemma": [
        '```json\n{"name": "add", "parameters": {"x": 3}}\n```',
        '{"name": "now.utc-0", "parameters": {}}',
    ],
    "granite": ['<|tool_call|>[{"name": "add", "arguments": {"x": 3}}]'],
}
SEVERAL = {
    "hermes": "\n".join(CALLS["hermes"]),
    "smollm2": '<tool_call>[{"name": "add", "arguments": {"x": 3}}, '
    '{"name": "now.utc-0", "arguments": {}}]</tool_call>',
    "mistral-named": "".join(CALLS["mistral-named"]),
}
FORMATS = {
    form.name: form for form in (HERMES, SMOLLM2, LLAMA, MISTRAL, MISTRAL_NAMED, GEMMA, GRANITE)
}
each_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


@cache
def tokens() -> Any:
    from llguidance.hf import from_tokenizer

    return from_tokenizer(smollm2(), n_vocab=49152)


def reads(
    text: str,
    form: ToolFormat,
    reasoning: Reasoning | None = None,
    opening: str = "",
    special: dict[str, int] | None = None,
    tools: Any = TOOLS,
    **options: Any,
) -> str:
    """``whole`` where a text is an answer, ``open`` where it may begin one, else ``refused``."""
    checked = ChatOptions(tools, **options)
    constraint = answer_constraint(checked, form, reasoning, opening, (special or {}).get)
    matcher = llguidance.LLMatcher(tokens(), llguidance_grammar(json.dumps(constraint)))
    assert not matcher.get_error()
    ids = smollm2()(text, add_special_tokens=False)["input_ids"]
    if matcher.validate_tokens(ids) < len(ids):
        return "refused"
    matcher.consume_tokens(ids)
    return "whole" if matcher.is_accepting() else "open"


@each_format
@pytest.mark.parametrize("reasoning", [None, THINK], ids=["plain", "thinking"])
def test_calls_of_the_tools_are_answers_unless_none_may_be(
    form: ToolFormat, reasoning: Reasoning | None
) -> None:
    for text in CALLS[form.name]:
        assert reads(text, form, reasoning) == "whole"
        assert reads(text, form, reasoning, tool_choice="required") == "whole"
        assert reads(text, form, reasoning, response_format=RESPONSE) == "whole"
        assert reads(text, form, reasoning, parallel_tool_calls=False) == "whole"
        assert reads(text, form, reasoning, tool_choice="none") == "refused"
        named = reads(text, form, reasoning, tool_choice="add")
        assert named == ("whole" if '"add"' in text or "]add[" in text else "refused")


NODE = {
    "type": "object",
    "properties": {
        "code": {"enum": [f"code {n}" for n in range(3_000)]},
        "odd": {"enum": ["\u2028ü", "</tool_call>", "a\x01b", "\\"]},
        "next": {"$ref": "#"},
    },
    "required": ["code"],
}


@each_format
def test_schemas_of_tools_may_refer_to_themselves_and_list_thousands(form: ToolFormat) -> None:
    tools = [{"type": "function", "function": {"name": name, "parameters": NODE}} for name in "ab"]

    def called(arguments: Any) -> str:
        written = json.dumps(arguments, ensure_ascii=False)
        if form.shape == "named":
            return f"{form.begin}b{form.separator}{written}"
        call = json.dumps({"name": "b", form.arguments: None}).replace("null", written)
        return form.begin + (f"[{call}]" if form.shape == "list" else call) + form.end

    for choice in ("auto", "required", "b"):
        for odd in NODE["properties"]["odd"]["enum"]:
            inner = {"code": "code 2999", "odd": odd, "next": {"code": "code 0"}}
            text = called({"code": "code 17", "next": inner})
            assert reads(text, form, tools=tools, tool_choice=choice) == "whole"
        for wrong in ({"code": "code 3000"}, {"code": "code 1", "next": {"odd": "x"}}):
            text = called(wrong)
            assert reads(text, form, tools=tools, tool_choice="b") == "refused"


@each_format
def test_free_text_is_an_answer_unless_a_tool_must_be_called(form: ToolFormat) -> None:
    for text in ("Hello <tool", '{"name": "nobody"', "[1, 2] ```json\n{}```", "a [TOOL"):
        assert reads(text, form) == "whole"
        assert reads(text, form, tool_choice="none") == "whole"
        assert reads(text, form, tool_choice="required") == "refused"
    assert reads("", form) == "whole"
    assert reads("", form, tool_choice="required") == "open"


@each_format
def test_a_call_that_was_begun_follows_the_schema(form: ToolFormat) -> None:
    for text in CALLS[form.name]:
        for right, wrong in (
            ('"x": 3', '"x": "3"'),
            ('"x": 3', '"y": 3'),
            ('"x": 3', '"x": 3, "y": 1'),
            ('{"x": 3', "{"),
            ('"add"', '"nobody"') if form.shape != "bare" else ("add", "add"),
            ("{}", '{"x": 1}'),
        ):
            if right in text and right != wrong:
                assert reads(text.replace(right, wrong, 1), form) == "refused", (text, wrong)


@pytest.mark.parametrize("name", SEVERAL)
def test_several_calls_are_one_answer_where_they_are_allowed(name: str) -> None:
    form, text = FORMATS[name], SEVERAL[name]
    assert reads(text, form) == reads(text, form, tool_choice="required") == "whole"
    assert reads(text, form, parallel_tool_calls=False) == "refused"


def test_smollm2_may_say_that_no_tool_fits_unless_it_must_call_one() -> None:
    assert reads("<tool_call>[]</tool_call>", SMOLLM2) == "whole"
    assert reads("<tool_call>[]</tool_call>", SMOLLM2, tool_choice="required") == "refused"


def test_text_beside_a_response_format_is_json_of_its_schema() -> None:
    for form in FORMATS.values():
        assert reads('{"name": "nobody"}', form, response_format=RESPONSE) == "whole"
        assert reads('{"name": 3', form, response_format=RESPONSE) == "refused"
        assert reads("Hello", form, response_format=RESPONSE) == "refused"


@pytest.mark.parametrize(
    ("opening", "text", "result"),
    [
        ("", "<think>a <tool_call> b</think>\n\nHello", "whole"),
        ("", "\n<think>hm", "open"),
        ("", "Hello <think>", "refused"),
        ("<think>\n", "hm <tool_call></think>Hello", "whole"),
        ("<think>\n", "hm", "open"),
        ("<think>\n\n</think>\n\n", "Hello", "whole"),
        ("<think>\n\n</think>\n\n", "<think>hm", "refused"),
    ],
)
def test_reasoning_is_free_and_comes_first(opening: str, text: str, result: str) -> None:
    assert reads(text, HERMES, THINK, opening) == result


def test_after_reasoning_the_call_or_the_json_is_still_bound() -> None:
    call = CALLS["hermes"][0]
    for opening, begin in (("", "<think>"), ("<think>\n", "")):
        thought = f"{begin}hm {{</think>\n\n"
        assert reads(thought + call, HERMES, THINK, opening, tool_choice="required") == "whole"
        assert reads(f"{thought}Hi", HERMES, THINK, opening, tool_choice="required") == "refused"
        json_only = {"response_format": RESPONSE}
        assert reads(f'{thought}{{"name": "x"}}', HERMES, THINK, opening, **json_only) == "whole"


def test_a_response_format_alone_is_the_schema_itself() -> None:
    options = ChatOptions(response_format=RESPONSE)
    assert answer_constraint(options, HERMES, None, "", {}.get) == {"json": SCHEMA}
    assert answer_constraint(ChatOptions(), HERMES, THINK, "", {}.get) is None
    constraint = answer_constraint(options, HERMES, THINK, "<think>", {}.get)
    assert constraint is not None
    assert "grammar" in constraint


def test_markers_that_are_special_tokens_are_those_tokens() -> None:
    names = ["<repo_name>", "<reponame>", "<file_sep>", "<filename>", "<gh_stars>"]
    ids = dict(zip(names, smollm2().convert_tokens_to_ids(names), strict=True))
    markers = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>"]
    special = dict(zip(markers, ids.values(), strict=True))

    def read(text: str, form: ToolFormat = HERMES, **options: Any) -> str:
        for marker, name in zip(markers, names, strict=True):
            text = text.replace(marker, name)
        return reads(text.replace("SPELLED ", "<tool_"), form, THINK, "", special, **options)

    for text in (CALLS["hermes"][0], f"Look: {CALLS['hermes'][0]}", "<think>hm</think>Hello"):
        assert read(text) == "whole"
    assert read(CALLS["hermes"][0], tool_choice="required") == "whole"
    assert read(CALLS["hermes"][0], tool_choice="none") == "refused"
    assert read("SPELLED call>") == "refused"  # text that would be read as a call
    for text in CALLS["llama"]:
        assert read(text, LLAMA) == "whole"
