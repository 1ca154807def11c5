"""LangChain's own test suites for chat models, on the packaged model and on a scripted one.

The packaged model of 135 million parameters takes minutes, and cannot do all that is asked of it:
what it cannot, it is expected to fail. The scripted model answers as an able model would, which
shows that prompts, constraints, parsers and messages let it.

What is skipped, and why:

- ``test_init_from_env``: a local model has no key to be read from the environment.
- ``test_serdes``: not declared serialisable, because LangChain's ``load`` admits only the classes
  of a list in langchain-core.
- ``test_stream_time``: it replays recorded HTTP traffic, and there is none.
- images, PDFs and audio, Anthropic's formats: not offered; the models read text.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOLLM2
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from rapid_llm.decoder import RapidDecoder
from scripted import Scripted
from tiny import save_tiny_model

from langchain_rapid import ChatRapid


@cache
def _another_model() -> tuple[tempfile.TemporaryDirectory[str], str]:
    folder = tempfile.TemporaryDirectory()
    return folder, save_tiny_model(Path(folder.name) / "another")


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatRapid

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return SMOLLM2

    @property
    def supports_json_mode(self) -> bool:
        return True


_CALLS = '<tool_call>[{"name": "%s", "arguments": %s}]</tool_call>'
_JOKE = '{"setup": "Why do cats purr?", "punchline": "They have a motor."}'
_SCRIPT = {
    "magic_function_no_args()": _CALLS % ("magic_function_no_args", "{}"),
    "magic_function(3)": _CALLS % ("magic_function", '{"input": 3}'),
    "[user]Hello!": _CALLS % ("magic_function", '{"input": 3}'),
    "Pirate": _CALLS % ("greeting_generator", '{"answer_style": "Pirate"}'),
    "What is 3 + 4": _CALLS % ("my_adder_tool", '{"a": 3, "b": 4}'),
    "It's sunny.": "It is sunny in San Francisco.",
    "San Francisco": _CALLS % ("get_weather", '{"location": "San Francisco, CA"}'),
    "你好啊集团": _CALLS
    % ("unicode_customer", '{"customer_name": "你好啊集团", "description": "Technology"}'),
    "こんにちは": _CALLS
    % ("unicode_customer", '{"customer_name": "こんにちは株式会社", "description": "Company"}'),
    '"name": "JokeDict"': _CALLS % ("JokeDict", _JOKE),
    '"name": "Joke"': _CALLS % ("Joke", _JOKE),
    "joke": _JOKE,
}


class _Able(Scripted):
    """Answers as an able model would."""

    def answer(self, prompt: str) -> str:
        fits = (answer for asked, answer in _SCRIPT.items() if asked in prompt)
        return next(fits, "Hello there.")


@cache
def _able() -> RapidDecoder:
    return _Able()


class TestScripted(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatRapid

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"decoder": _able(), "max_tokens": 200}

    @property
    def supports_json_mode(self) -> bool:
        return True


class TestScriptedCalls(TestScripted):
    """Structured output by calls."""

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        return {"method": "function_calling"}


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
class TestIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatRapid

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return SMOLLM2 | {"max_tokens": 200}

    @pytest.fixture
    def model(self, request: pytest.FixtureRequest) -> BaseChatModel:
        """The model; greedy, the small one repeats itself without end in strings of JSON.

        What keeps it from that keeps it from repeating the arguments that a question names, too.
        """
        penalty = {"repetition_penalty": 1.3} if "structured_output" in request.node.name else {}
        asked = getattr(request, "param", None) or {}
        own = self.standard_chat_model_params | self.chat_model_params
        return ChatRapid(**(own | penalty | asked))

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return _another_model()[1]

    @pytest.mark.xfail(
        strict=True, reason="the small model answers by itself where it may call a tool"
    )
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)

    @pytest.mark.xfail(
        strict=True, reason="the small model writes no Chinese, and no end of its own text"
    )
    def test_unicode_tool_call_integration(self, model: BaseChatModel, **options: Any) -> None:
        super().test_unicode_tool_call_integration(model, **options)

    @pytest.mark.xfail(
        strict=True, reason="the small model makes up names of fields where no schema says them"
    )
    def test_json_mode(self, model: BaseChatModel) -> None:
        super().test_json_mode(model)
