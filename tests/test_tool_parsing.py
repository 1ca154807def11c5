"""Content, reasoning and calls are the same however the text of an answer is split."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

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
from rapid_llm.tools.answers import joined_calls
from rapid_llm.tools.parsing import AnswerParser, Parsed

THINK = Reasoning("<think>", "</think>")
NAMES = ("weather", "add")
PARIS = '{"city": "Paris \\"l\'été\\" {[", "days": [1, {"a": null}]}'

FORMATS = [HERMES, SMOLLM2, LLAMA, MISTRAL, MISTRAL_NAMED, GEMMA, GRANITE]
WRITTEN: dict[str, list[str]] = {
    "hermes": [
        'Let me look.\n<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>',
        '<think>\nWhich <tool_call>?\n</think>\n\n<tool_call>{"arguments": %s, "name": "weather"}'
        '</tool_call><tool_call>{"name": "add"}</tool_call>\n',
    ],
    "smollm2": [
        '<tool_call>[\n{"name": "weather", "arguments": %s},\n{"name": "add", "arguments": {}}\n]'
        "</tool_call>",
    ],
    "llama": [
        '{"name": "weather", "parameters": %s}; {"name": "add", "parameters": {}}',
        '<|python_tag|>{"name": "weather", "parameters": %s}{"name": "add", "parameters": null}',
    ],
    "mistral": [
        '[TOOL_CALLS] [{"name": "weather", "arguments": %s, "id": "a1b2c3d4e"}, '
        '{"name": "add", "arguments": {}}]',
    ],
    "mistral-named": [
        "Looking.[TOOL_CALLS]weather[ARGS]%s[TOOL_CALLS]add[ARGS]{}",
        "[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]%s[TOOL_CALLS]add[CALL_ID]b[ARGS] {}",
    ],
    "gemma": [
        '```json\n{"name": "weather", "parameters": %s}\n{"name": "add", "parameters": {}}\n```',
        '{"name": "weather", "parameters": %s}\n{"name": "add"}',
    ],
    "granite": [
        '<|tool_call|>[{"name": "weather", "arguments": %s}, {"name": "add", "arguments": {}}]',
    ],
}


def parse(
    pieces: Sequence[str], form: ToolFormat | None, opening: str = ""
) -> tuple[str, str, list[tuple[str, str]]]:
    parser = AnswerParser(form, THINK, NAMES, opening)
    parsed = [*map(parser.feed, pieces), parser.finish()]
    calls = joined_calls([call for each in parsed for call in each.tool_calls])
    assert len(calls) == parser.calls
    assert len({call.id for call in calls}) == len(calls)
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)
    return (
        "".join(each.content for each in parsed),
        "".join(each.reasoning_content for each in parsed),
        [(call.name, call.arguments) for call in calls],
    )


def split(text: str, seed: int) -> list[str]:
    draw = random.Random(seed)
    cuts = sorted(draw.sample(range(len(text) + 1), draw.randint(0, len(text) // 2)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def called(form: ToolFormat) -> list[str]:
    return [text % PARIS for text in WRITTEN[form.name]]


def other_texts(form: ToolFormat) -> list[str]:
    texts = called(form)
    answered = [f"<think>\nhm\n</think>\n\n{text}" for text in texts if "<think>" not in text]
    plain = ['Just text, [1] {"a": 2} <tool; `code`.\n', "", "<think>no end", "a </think> b"]
    broken = [text[: len(text) * 3 // 4] for text in texts]
    broken += [text.replace("{", "(", 1) for text in texts]
    return answered + plain + broken


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_deltas_joined_are_the_whole_under_any_splitting(form: ToolFormat) -> None:
    texts, others = called(form), other_texts(form)
    whole = {text: parse([text], form) for text in texts + others}
    for seed in range(200):
        for text in [*texts, others[seed % len(others)]]:
            assert parse(split(text, seed), form) == whole[text], (seed, text)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_calls_have_their_names_and_arguments_as_written(form: ToolFormat) -> None:
    for text in called(form):
        content, reasoning, calls = parse([text], form)
        assert calls == [("weather", PARIS), ("add", "{}")]
        assert json.loads(calls[0][1])["days"] == [1, {"a": None}]
        assert content.strip() in ("", "Let me look.", "Looking.")
        assert reasoning in ("", "Which <tool_call>?")


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_markers_in_strings_of_arguments_are_text(form: ToolFormat) -> None:
    for marker in {*form.markers, "</think>", "<think>"}:
        city = f'\\"{marker} {marker[:-1]}'
        arguments = json.dumps({"city": city, marker: [marker, "\\" + marker]})
        for written in WRITTEN[form.name]:
            text = f"{written % arguments}"
            _, reasoning, calls = parse([text], form)
            assert calls == [("weather", arguments), ("add", "{}")], text
            for seed in range(10):
                assert parse(split(text, seed), form)[1:] == (reasoning, calls), (seed, text)


def test_what_follows_the_end_of_a_call_is_content() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": "</tool_call>"}}</tool_call>\nSo <b>.'
    for pieces in ([text], list(text)):
        assert parse(pieces, HERMES) == ("So <b>.", "", [("add", '{"a": "</tool_call>"}')])


def test_a_call_that_lacks_braces_ends_at_its_end() -> None:
    text = '<tool_call>{"name": "add", "arguments": {"a": [1]</tool_call>Done.'
    for pieces in ([text], list(text)):
        assert parse(pieces, HERMES) == ("Done.", "", [("add", '{"a": [1]')])


def test_text_without_calls_is_content() -> None:
    for form in FORMATS:
        for text in ("Hello <tool", '{"name": "nobody", "parameters": {}}', '{"a": 1}', "[1, 2]"):
            assert parse([text], form) == (text, "", [])


def test_calls_are_not_looked_for_where_there_are_no_tools() -> None:
    text = '<tool_call>{"name": "add"}</tool_call>'
    assert parse([text], None) == (text, "", [])


def test_arguments_arrive_before_the_call_ends() -> None:
    parser = AnswerParser(HERMES, None, NAMES)
    first = parser.feed('<tool_call>\n{"name": "weather", "arguments": {"city": "Par')
    assert [(c.name, c.arguments) for c in first.tool_calls] == [("weather", '{"city": "Par')]
    second = parser.feed('is"')
    assert [(c.id, c.name, c.arguments) for c in second.tool_calls] == [(None, None, 'is"')]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
        ('<tool_call>{"name": "ad', '<tool_call>{"name": "ad', []),
        ("<tool_call>add(1)</tool_call>", "<tool_call>add(1)</tool_call>", []),
        ('<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
        ('<tool_call>{"name": "add", "arguments": {}}x</tool_call>', "x", [("add", "{}")]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}', "", [("add", '{"a": 1}')]),
        ('<tool_call>{"name": "add", "arguments": {}, "id": 7}', "", [("add", "{}")]),
        ("<tool_call>[]</tool_call>", "", []),
    ],
)
def test_a_call_that_is_cut_or_broken_is_told_as_it_is(
    text: str, content: str, calls: list[Any]
) -> None:
    assert parse([text], HERMES) == (content, "", calls)


@pytest.mark.parametrize(
    ("opening", "text", "content", "reasoning"),
    [
        ("<|im_start|>assistant\n<think>\n", "hm\n</think>\n\nYes.", "Yes.", "hm"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "Yes.", "Yes.", ""),
        ("<|im_start|>assistant\n", "<think>hm</think>Yes.", "Yes.", "hm"),
        ("<|im_start|>assistant\n", "Yes.", "Yes.", ""),
        ("<think>\nSo", " far</think>Yes.", "Yes.", " far"),
    ],
)
def test_reasoning_is_told_from_content(
    opening: str, text: str, content: str, reasoning: str
) -> None:
    for pieces in ([text], list(text)):
        assert parse(pieces, HERMES, opening) == (content, reasoning, [])


def test_mistral_s_reasoning_has_its_own_markers() -> None:
    parser = AnswerParser(MISTRAL, Reasoning("[THINK]", "[/THINK]"), NAMES)
    parsed = parser.feed("[THINK]hm[/THINK]Yes.")
    assert (parsed, parser.finish()) == (Parsed("Yes.", "hm"), Parsed())
