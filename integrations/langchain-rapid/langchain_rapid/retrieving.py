"""Retrieval for chats, ahead of LangChain's cache: what was found goes into both prompts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

from langchain_core.callbacks import Callbacks
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatResult, LLMResult
from langchain_core.runnables import RunnableConfig
from rapid_llm.aio import in_thread

from langchain_rapid.answers import joined
from langchain_rapid.batches import Batches
from langchain_rapid.messages import documents_of, last_question, search_query, text_of
from langchain_rapid.options import overrides
from langchain_rapid.runs import beside
from langchain_rapid.settings import RapidModel
from langchain_rapid.tools import with_cut_calls


class RetrievingChat(RapidModel, Batches[LanguageModelInput, AIMessage], BaseChatModel):
    """Base class of ChatRapid: its public calls retrieve first.

    So both prompts are in the key of LangChain's cache.
    """

    _reads_results_of_tools: ClassVar[bool] = True

    def generate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> LLMResult:
        """LangChain's method; each chat with something retrieved for it is grounded first."""
        if any(self._is_ungrounded(chat, kwargs) for chat in messages):
            config = beside({"callbacks": callbacks, **kwargs})
            results = []
            for chat in messages:
                grounded, found = self._ground(chat, config, kwargs)
                own = kwargs | found
                results.append(super().generate([grounded], stop, callbacks, **own))
            return joined(results)
        return super().generate(messages, stop, callbacks, **kwargs)

    async def agenerate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> LLMResult:
        """:meth:`generate` for asyncio."""
        if any(self._is_ungrounded(chat, kwargs) for chat in messages):
            config = beside({"callbacks": callbacks, **kwargs})
            results = []
            for chat in messages:
                grounded, found = await self._aground(chat, config, kwargs)
                own = kwargs | found
                results.append(await super().agenerate([grounded], stop, callbacks, **own))
            return joined(results)
        return await super().agenerate(messages, stop, callbacks, **kwargs)

    # LangChain's own streaming leaves out _generate, and callbacks see what these two return.

    def _generate_with_cache(self, *args: Any, **kwargs: Any) -> ChatResult:
        return with_cut_calls(super()._generate_with_cache(*args, **kwargs))

    async def _agenerate_with_cache(self, *args: Any, **kwargs: Any) -> ChatResult:
        return with_cut_calls(await super()._agenerate_with_cache(*args, **kwargs))

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """LangChain's method; a chat with something retrieved for it is grounded first."""
        messages = self._convert_input(input).to_messages()
        if self._is_ungrounded(messages, kwargs):
            input, found = self._ground(messages, beside(config), kwargs)
            kwargs |= found
        yield from super().stream(input, config, stop=stop, **kwargs)

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """:meth:`stream` for asyncio."""
        messages = self._convert_input(input).to_messages()
        if self._is_ungrounded(messages, kwargs):
            input, found = await self._aground(messages, beside(config), kwargs)
            kwargs |= found
        async for chunk in super().astream(input, config, stop=stop, **kwargs):
            yield chunk

    def _is_ungrounded(self, messages: list[BaseMessage], kwargs: dict[str, Any]) -> bool:
        """Whether the draft is still to be made; a draft given by the call takes precedence."""
        if kwargs.get("draft_messages") is not None or kwargs.get("retrieved") is not None:
            return False
        return self.retriever is not None or any(map(documents_of, messages))

    def _ground(
        self, messages: list[BaseMessage], config: RunnableConfig, arguments: Mapping[str, Any]
    ) -> tuple[list[BaseMessage], dict[str, Any]]:
        if self.retriever is None:
            return self._with_tool_documents(messages, arguments)
        chunks = self._retrieve(search_query(messages), config)
        return self._with_contexts(messages, chunks, arguments)

    async def _aground(
        self, messages: list[BaseMessage], config: RunnableConfig, arguments: Mapping[str, Any]
    ) -> tuple[list[BaseMessage], dict[str, Any]]:
        if self.retriever is None:
            return await in_thread(partial(self._with_tool_documents, messages, arguments))
        chunks = await self._aretrieve(search_query(messages), config)
        return await in_thread(partial(self._with_contexts, messages, chunks, arguments))

    def _with_contexts(
        self, messages: list[BaseMessage], chunks: list[Document], arguments: Mapping[str, Any]
    ) -> tuple[list[BaseMessage], dict[str, Any]]:
        """The target's messages, and arguments of the call for the draft and the documents."""
        from langchain_rapid.conversations import around_question

        index = last_question(messages)
        contexts = self._contexts(chunks, text_of(messages[index]), arguments)
        return around_question(messages, index, contexts).as_call()

    def _with_tool_documents(
        self, messages: list[BaseMessage], arguments: Mapping[str, Any]
    ) -> tuple[list[BaseMessage], dict[str, Any]]:
        from langchain_rapid.conversations import with_tool_documents

        given = {"order": self.order} | overrides(arguments)
        order, confidence = given["order"], given.get("confidence")
        return with_tool_documents(messages, self._sources, order, confidence).as_call()
