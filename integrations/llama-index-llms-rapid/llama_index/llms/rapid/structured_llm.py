"""A RapidLLM whose answers are objects of a pydantic class."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing, closing
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    MessageRole,
)
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.llms.callbacks import llm_chat_callback
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.prompts import BasePromptTemplate

from llama_index.llms.rapid.objects import aanswered, answered, astreamed, streamed
from llama_index.llms.rapid.templates import FilledMessages


class StructuredRapidLLM(StructuredLLM):
    """LlamaIndex's structured LLM, which keeps the retrieved text of filled templates.

    LlamaIndex's own turns the messages into a new template, so that the target would read the
    retrieved text without the documents that it is from.
    """

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex serializes this class under."""
        return "StructuredRapidLLM"

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer messages with an object, in ``raw`` of the response."""
        return _response(answered(self.llm, self.output_cls, self._extended(messages), kwargs))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """:meth:`chat` without blocking the event loop."""
        extended = self._extended(messages)
        return _response(await aanswered(self.llm, self.output_cls, extended, kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """:meth:`chat` as a stream of partial objects."""
        objects = streamed(self.llm, self.output_cls, self._extended(messages), kwargs)

        def responses() -> ChatResponseGen:
            with closing(objects):
                for known in objects:
                    yield _response(known)

        return responses()

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """:meth:`stream_chat` without blocking the event loop."""
        objects = astreamed(self.llm, self.output_cls, self._extended(messages), kwargs)

        async def responses() -> ChatResponseAsyncGen:
            async with aclosing(objects):
                async for known in objects:
                    yield _response(known)

        return responses()

    def _extended(self, messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
        """The messages with the LLM's system prompt, which messages of a template already have."""
        if isinstance(messages, FilledMessages):
            return messages
        return self.llm._extend_messages(list(messages))

    def _get_messages(self, prompt: BasePromptTemplate, **prompt_args: Any) -> list[ChatMessage]:
        return self.llm._get_messages(prompt, **prompt_args)


def _response(known: BaseModel) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=known.model_dump_json())
    return ChatResponse(message=message, raw=known)
