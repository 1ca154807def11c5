"""One list of a call's arguments, for every method and every kind of decoder."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from conftest import tiny_model, tiny_tokenizer

from rapid_llm import (
    GenerationRequest,
    InvalidParameterError,
    RapidDecoder,
    RapidPipeline,
    RemoteDecoder,
    SamplingParams,
)
from rapid_llm.batching import Scheduler
from rapid_llm.questions import Question
from rapid_llm.tools import answers
from rapid_llm.tools.answers import ChatRequest
from rapid_llm.tools.definitions import ChatOptions

CALLS: list[tuple[Any, str, type]] = [
    *((kind, name, GenerationRequest)
      for kind in (RapidDecoder, RemoteDecoder, Scheduler)
      for name in ("generate", "stream", "astream")),
    (RapidPipeline, "ask", Question),
    (RapidPipeline, "stream", Question),
    *((answers, name, ChatRequest) for name in ("chat", "stream_chat", "astream_chat")),
]  # fmt: skip


def decoder(kind: type[RapidDecoder] = RapidDecoder) -> Any:
    return kind(tiny_model(), tiny_tokenizer())


@pytest.mark.parametrize(("kind", "name", "made"), CALLS)
def test_help_shows_the_arguments_with_their_defaults(kind: Any, name: str, made: type) -> None:
    shown = list(inspect.signature(getattr(kind, name)).parameters.values())
    assert shown[0].name == ("self" if isinstance(kind, type) else "decoder")
    assert shown[1:] == list(inspect.signature(made).parameters.values())


@pytest.mark.parametrize(
    ("described", "made"),
    [
        (RapidDecoder.stream, GenerationRequest),
        (RapidPipeline.stream, Question),
        (answers.stream_chat, ChatRequest),
    ],
)
def test_every_argument_is_described(described: Callable[..., Any], made: type) -> None:
    text = (inspect.getdoc(described) or "").split("Args:")[1].split("\n\n")[0]
    names = re.findall(r"^    ([a-z_, ]+):", text, re.MULTILINE)
    described_names = [name for group in names for name in group.split(", ") if name != "decoder"]
    assert described_names == [field.name for field in fields(made)]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("samplng", "did you mean 'sampling'?"),
        ("max_tokens", "give it as sampling=SamplingParams(max_new_tokens=…)"),
        ("gamma", "give it as speculation=SpeculationConfig(gamma=…)"),
        ("zzz", "known are target_prompt, draft_prompt, sampling"),
    ],
)
def test_a_wrong_name_is_an_error_that_names_the_right_one(name: str, remedy: str) -> None:
    wrong = {name: 3}
    for call in (decoder().generate, RemoteDecoder("http://localhost").astream):
        with pytest.raises(InvalidParameterError) as caught:
            call([5, 6], **wrong)  # type: ignore[arg-type]
        assert f"unknown argument {name!r}" in str(caught.value)
        assert remedy in str(caught.value)


def test_a_wrong_name_of_a_chat_s_argument_is_told_too() -> None:
    for call in (answers.chat, answers.stream_chat, answers.astream_chat):
        with pytest.raises(InvalidParameterError, match="did you mean 'options'"):
            call(decoder(), [], option=ChatOptions())  # type: ignore[call-arg]
        with pytest.raises(InvalidParameterError, match=r"sampling=SamplingParams\(max_new_tokens"):
            call(decoder(), [], max_tokens=3)  # type: ignore[call-arg]


def test_each_of_many_questions_is_asked_with_known_arguments_only() -> None:
    pipeline = RapidPipeline(decoder(), "w1 w2")
    with pytest.raises(InvalidParameterError, match="did you mean 'sampling'"):
        pipeline.ask_many(["w1", "w2"], "lc", samplings=SamplingParams())


def test_generate_gives_what_a_stream_of_ones_own_gives() -> None:
    class Counting(RapidDecoder):
        asked = 0

        def stream(self, *prompts: Any, **options: Any) -> Any:  # type: ignore[override]
            self.asked += 1
            return super().stream(*prompts, **options)

    counting = decoder(Counting)
    counting.generate([5, 6], sampling=SamplingParams(max_new_tokens=1))
    assert counting.asked == 1
