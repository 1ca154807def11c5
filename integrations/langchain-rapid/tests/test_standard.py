"""LangChain's own test suites for chat models, on the packaged model.

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


@pytest.mark.usefixtures("smollm2")
class TestIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatRapid

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # Greedy, the small model would repeat itself inside of a string without end.
        return SMOLLM2 | {"max_tokens": 200, "repetition_penalty": 1.3}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return _another_model()[1]
