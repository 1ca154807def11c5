"""Answers with tools, from the decoder: the prompts, the constraint and the parser together."""

from __future__ import annotations

import asyncio
import json
from functools import cache
from typing import Any

import pytest
from chat_templates import TEMPLATES, with_template
from conftest import tiny_model
from test_encoding import user

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.encoding import encode_literal, encode_prompt
from rapid_llm.errors import InvalidParameterError
from rapid_llm.results import Delta
from rapid_llm.stats import Stats
from rapid_llm.tools.answers import (
    AnswerStream,
    ChatAnswer,
    astream_chat,
    chat,
    prepare,
    stream_chat,
)
from rapid_llm.tools.definitions import ChatOptions

SPECIAL = {
    "qwen": ("<tool_call>", "</tool_call>", "<think>", "</think>"),
    "llama": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
    "mistral-named": ("[TOOL_CALLS]", "[ARGS]"),
    "granite": ("<|tool_call|>",),
    "gemma": (),
    "smollm2": (),
}
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "now": {"type": "boolean"}},
    "required": ["city", "now"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PLACE}},
    {"type": "function", "function": {"name": "stop"}},
]
CHAT = user("How is the weather?")
HERE = [*user("Rome, now."), *user("How is the weather?")]
each_family = pytest.mark.parametrize("family", SPECIAL)


@cache
def decoder(family: str) -> RapidDecoder:
    tokenizer = with_template(TEMPLATES[family], *SPECIAL[family])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=end, max_position_embeddings=2048)
    return RapidDecoder(model, tokenizer)


def sampled(seed: int, tokens: int = 400, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, max_new_tokens=tokens, **options)


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@each_family
@pytest.mark.parametrize("choice", ["required", "weather"])
def test_a_model_that_must_call_a_tool_calls_one_with_arguments_of_its_schema(
    family: str, choice: str
) -> None:
    options = ChatOptions(TOOLS, tool_choice=choice, parallel_tool_calls=False)
    for seed in range(3):
        speculation = SpeculationConfig(mode=("exact", "augmented", "paper")[seed], gamma=3)
        answer = chat(
            decoder(family),
            CHAT,
            HERE,
            options=options,
            sampling=sampled(seed),
            speculation=speculation,
            chat_template_kwargs={"enable_thinking": False},
        )
        assert answer.finish_reason == "tool_calls"
        assert answer.content == ""
        (call,) = answer.tool_calls
        arguments = json.loads(call.arguments)
        if call.name == "weather":
            assert arguments["city"] in ("Rome", "Oslo")
            assert isinstance(arguments["now"], bool)
            assert len(arguments) == 2
        else:
            assert choice == "required"
            assert (call.name, arguments) == ("stop", {})


def test_both_prompts_show_the_tools_and_the_history() -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "stop", "arguments": "{}"}}
    history = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "stopped"},
    ]
    for family in SPECIAL:
        one = decoder(family)
        prompts = [CHAT + history, HERE + history]
        answer = chat(one, *prompts, options=ChatOptions(TOOLS), sampling=sampled(0, tokens=4))
        shown = {"tools": ChatOptions(TOOLS).template_variables()["tools"]}
        target, draft = (encode_prompt(p, one.tokenizer, shown) for p in prompts)
        assert answer.stats.prompt_tokens == len(target)
        assert answer.stats.draft_prompt_tokens == len(draft)
        assert "stopped" in one.tokenizer.decode(draft)


@each_family
def test_an_answer_without_tools_is_the_decoder_s_own(family: str) -> None:
    sampling = SamplingParams(max_new_tokens=40)
    answer = chat(decoder(family), CHAT, sampling=sampling)
    plain = decoder(family).generate(CHAT, sampling=sampling)
    assert answer.token_ids == plain.token_ids
    if "<think>" not in SPECIAL[family]:
        assert answer.content == plain.text
    assert answer.finish_reason == plain.finish_reason


def test_a_call_that_the_length_cuts_is_told_as_cut() -> None:
    options = ChatOptions(TOOLS, tool_choice="weather")
    lengths = range(20, 60, 4)
    answers = [
        chat(decoder("smollm2"), CHAT, options=options, sampling=sampled(1, tokens=n))
        for n in lengths
    ]
    cut = [a for a in answers if a.finish_reason == "length"]
    calls = [call for answer in cut for call in answer.tool_calls]
    assert calls
    assert not all(is_json(call.arguments) for call in calls)
    assert all(is_json(call.arguments) for a in answers if a not in cut for call in a.tool_calls)


def test_deltas_joined_are_the_answer_and_asyncio_gives_the_same() -> None:
    options = ChatOptions(TOOLS, tool_choice="required")
    given = {"options": options, "sampling": sampled(3)}

    async def collect() -> list[Any]:
        return [delta async for delta in astream_chat(decoder("qwen"), CHAT, HERE, **given)]

    answers = [
        ChatAnswer.from_deltas(list(stream_chat(decoder("qwen"), CHAT, HERE, **given))),
        ChatAnswer.from_deltas(asyncio.run(collect())),
        chat(decoder("qwen"), CHAT, HERE, **given),
    ]
    said = {
        (a.content, a.reasoning_content, *((c.name, c.arguments) for c in a.tool_calls))
        for a in answers
    }
    assert len(said) == 1


def test_a_stream_that_is_closed_leaves_the_decoder_usable() -> None:
    options = ChatOptions(TOOLS, tool_choice="weather", parallel_tool_calls=False)
    stream = stream_chat(decoder("smollm2"), CHAT, options=options, sampling=sampled(0))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    answer = chat(decoder("smollm2"), CHAT, options=options, sampling=sampled(0))
    assert answer.tool_calls[0].name == "weather"


def test_an_answer_goes_into_the_history_as_it_is() -> None:
    options = ChatOptions(TOOLS, tool_choice="weather", parallel_tool_calls=False)
    for family in ("qwen", "mistral", "smollm2"):
        answer = chat(
            decoder(family),
            CHAT,
            options=options,
            sampling=sampled(0),
            chat_template_kwargs={"enable_thinking": False},
        )
        (call,) = answer.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        text = decoder(family).tokenizer.decode(
            encode_prompt([*CHAT, answer.message(), result], decoder(family).tokenizer)
        )
        assert json.loads(call.arguments)["city"] in text
        assert "sunny" in text


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            {"options": ChatOptions(TOOLS), "sampling": SamplingParams(constraint="json")},
            "constraint was given together with tools",
        ),
        (
            {"options": ChatOptions(TOOLS), "chat_template_kwargs": {"tools": TOOLS}},
            "tools were given twice",
        ),
    ],
)
def test_what_excludes_each_other_is_refused(call: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidParameterError, match=says):
        chat(decoder("smollm2"), CHAT, **call)


def test_a_template_whose_calls_are_unknown_is_refused_for_tools_only() -> None:
    tokenizer = with_template(TEMPLATES["qwen-coder"])
    with pytest.raises(InvalidParameterError, match="in a format that is not known"):
        prepare(tokenizer, CHAT, ChatOptions(TOOLS))
    assert prepare(tokenizer, CHAT, ChatOptions()).constraint is None


# --- from tokens to parts ------------------------------------------------------------------------


def parts(
    family: str, text: str, *, finish: str = "stop", stop: tuple[str, ...] = ()
) -> ChatAnswer:
    """What a text, generated token by token, is read as; its markers are special tokens."""
    one = decoder(family)
    prepared = prepare(one.tokenizer, CHAT, ChatOptions(TOOLS))
    sampling = prepared.sampling(SamplingParams(stop=stop))
    reader: AnswerStream = prepared.stream(one, sampling)
    ids = one.tokenizer(text, add_special_tokens=False)["input_ids"]
    if finish == "stop" and not stop:
        ids.append(one.tokenizer.eos_token_id)
    last = len(ids) - 1
    return ChatAnswer.from_deltas(
        [
            reader.push(Delta("", (i,), finish if n == last else None, Stats()))  # type: ignore[arg-type]
            for n, i in enumerate(ids)
        ]
    )


def test_markers_that_are_special_tokens_are_read_and_others_dropped() -> None:
    call = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    answer = parts("qwen", f"<think>hm</think>\n\nA<|im_start|>B{call}")
    assert answer.content == "AB"
    assert answer.reasoning_content == "hm"
    assert [(c.name, c.arguments) for c in answer.tool_calls] == [("stop", "{}")]
    assert answer.finish_reason == "tool_calls"
    named = parts("mistral-named", "[TOOL_CALLS]stop[ARGS]{}[TOOL_CALLS]stop[ARGS]{}")
    assert [c.name for c in named.tool_calls] == ["stop", "stop"]
    tagged = parts("llama", '<|python_tag|>{"name": "stop", "parameters": {}}')
    assert [c.name for c in tagged.tool_calls] == ["stop"]


def test_an_answer_ends_before_a_stop_string() -> None:
    assert parts("qwen", "one two three", stop=(" three",)).content == "one two"
    assert parts("qwen", "one two", finish="length").finish_reason == "length"


def test_a_call_that_a_stop_string_cuts_is_no_call_to_be_made() -> None:
    text = '<tool_call>\n{"name": "stop", "arguments": {"a": "one. two"}}\n</tool_call>'
    for stop in (". ", '"arguments"', "name"):
        assert parts("qwen", text, stop=(stop,)).finish_reason == "stop"
    (call,) = parts("qwen", text, stop=(". ",)).tool_calls
    assert call.arguments == '{"a": "one'
    for stop in ("\n</tool_call>", "}\n"):
        whole = parts("qwen", text, stop=(stop,))
        assert whole.finish_reason == "tool_calls"
        assert [c.arguments for c in whole.tool_calls] == ['{"a": "one. two"}']
    named = parts("mistral-named", '[TOOL_CALLS]stop[ARGS]{"a": "one. two"}', stop=(". ",))
    assert named.finish_reason == "stop"


def test_the_end_of_a_turn_is_no_text_even_if_it_is_no_special_token() -> None:
    tokenizer = with_template(TEMPLATES["smollm2"].replace("<|im_end|>", "<tool>"))
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=None)
    one = RapidDecoder(model, tokenizer)
    reader = prepare(tokenizer, CHAT, ChatOptions()).stream(one, SamplingParams())
    ids = (*encode_literal("ok", tokenizer), tokenizer.convert_tokens_to_ids("<tool>"))
    assert reader.push(Delta("", ids, "stop", Stats())).content == "ok"
