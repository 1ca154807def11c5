"""ChatRapid: a chat model whose drafter reads what was retrieved, its target whole documents."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    CallbackManager,
    CallbackManagerForLLMRun,
    Callbacks,
)
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.runnables import Runnable, RunnableConfig
from pydantic import BaseModel, ConfigDict, model_validator
from rapid_llm.aio import in_thread, iterate_in_thread
from rapid_llm.errors import InvalidParameterError
from typing_extensions import Self

from langchain_rapid.encoding import Encoder
from langchain_rapid.messages import last_question, search_query, text_of, to_chat
from langchain_rapid.options import Call
from langchain_rapid.runs import beside, child_of
from langchain_rapid.settings import VERSION, RapidModel, at_once
from langchain_rapid.structured import (
    BoundChatRapid,
    Method,
    ToolLike,
    bound_tools,
    structured,
)
from langchain_rapid.tools import (
    as_openai_tools,
    generation_chunk,
    says_something,
    taken_options,
    with_cut_calls,
)

if TYPE_CHECKING:
    from rapid_llm.tools.answers import ChatDelta


class ChatRapid(RapidModel, BaseChatModel):
    """Chat model with retrieval-augmented speculative decoding.

    The messages are the target's prompt. The drafter's comes from one of three places:

    - :func:`create_rapid_documents_chain`, where ``create_stuff_documents_chain`` stood;
    - ``retriever=`` and ``documents=``: the last human message is the question, and is searched
      for with the two before it, without which a follow-up finds nothing;
    - ``draft_messages=`` of a call, or bound by ``bind``.

    Without one the target decodes plainly. Fields may be overridden for one call by arguments of
    their names, but for those that load models. None leaves a field as it is, ``seed=None`` draws
    afresh. ``confidence=`` of a call, in [0, 1], says how sure the retrieval of the draft was, for
    ``dynamic_eta``.

    Example:
        .. code-block:: python

            llm = ChatRapid(model="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16")
            llm.invoke("Hello", max_tokens=20)

    Raises:
        pydantic.ValidationError: an unknown field, or a value outside its range.
        RapidError: when called, see ``rapid_llm.RapidDecoder.stream``; and
            ``GenerationTimeoutError``, ``RetrievalError``.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    streaming: bool = False
    """Whether ``invoke`` streams to callbacks as well."""

    if TYPE_CHECKING:

        def __init__(self, **fields: Any) -> None: ...

    @model_validator(mode="after")
    def _set_rapid_version(self) -> Self:
        self._add_version("langchain-rapid", VERSION)
        return self

    @property
    def _llm_type(self) -> str:
        return "rapid-chat"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._tracing_params("chat", stop, kwargs)

    # --- tools and structured output -----------------------------------------------------------

    def bind(self, **kwargs: Any) -> BoundChatRapid:  # type: ignore[override]
        """The model with arguments of every call, which stay when tools or a schema are bound."""
        return BoundChatRapid(bound=self, kwargs=kwargs, config={})

    def bind_tools(
        self,
        tools: Sequence[ToolLike],
        *,
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools that it may call, or must.

        A call that the model begins is one of the tools', with arguments of its schema.

        Args:
            tools: LangChain's tools, functions, pydantic classes, TypedDicts, or OpenAI's form.
            tool_choice: ``auto`` (the model chooses, by default), ``any`` or ``required`` or True
                (it must call a tool), ``none`` or False, or the name of the tool that it must
                call.
            parallel_tool_calls: whether an answer may hold several calls, True by default.
            strict: whether schemas allow no other arguments; they are enforced in any case.
            kwargs: other arguments of every call.

        Raises:
            InvalidParameterError: a tool is none, or ``tool_choice`` names an unknown one.
        """
        return self.bind(**bound_tools(tools, tool_choice, parallel_tool_calls, strict), **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """The model with answers that are objects of a schema.

        Args:
            schema: pydantic class, TypedDict, JSON schema, or a tool in OpenAI's form.
            method: ``json_schema`` constrains the answer to the schema, ``function_calling`` makes
                the model call a tool of it, ``json_mode`` constrains the answer to JSON.
            include_raw: whether to return a dictionary with the keys ``raw``, ``parsed`` and
                ``parsing_error``, and raise no error of parsing.
            strict: True allows no properties that a JSON schema does not name, as it always is for
                classes. Schemas are enforced in any case.
            kwargs: arguments of every call.

        Raises:
            InvalidParameterError: the schema is none, or cannot be enforced.
        """
        return structured(
            self, schema, method=method, include_raw=include_raw, strict=strict, kwargs=kwargs
        )

    def _resolve_model_profile(self) -> Any:
        profile: dict[str, Any] = {
            "text_inputs": True,
            "text_outputs": True,
            "tool_calling": True,
            "tool_choice": True,
            "structured_output": True,
        }
        if self.decoder is not None:  # a model is not loaded to be asked
            profile["max_input_tokens"] = self.decoder.target.context_window
        return profile

    # --- generation ----------------------------------------------------------------------------

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """LangChain's; the inputs are answered at once, and a common document is read once.

        At most ``max_sequences`` are under way, and no more than ``max_concurrency`` of the config.
        """
        with at_once():
            return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """:meth:`batch` for asyncio."""
        with at_once():
            return await super().abatch(
                inputs, config, return_exceptions=return_exceptions, **kwargs
            )

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        if self._retrieves(kwargs):  # not done yet: stream_events (v3)
            messages, found = self._ground(messages, child_of(run_manager, CallbackManager), kwargs)
            kwargs |= found
        draft = self._draft(kwargs)
        call = self._call(stop, kwargs)
        for delta in self._answer(to_chat(messages), draft, call):
            if says_something(delta):
                yield generation_chunk(delta, call)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        if self._retrieves(kwargs):
            child = child_of(run_manager, AsyncCallbackManager)
            messages, found = await self._aground(messages, child, kwargs)
            kwargs |= found
        draft = self._draft(kwargs)
        call = self._call(stop, kwargs)
        chat = to_chat(messages)
        deltas = iterate_in_thread(partial(self._answer, chat, draft, call))
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                if says_something(delta):
                    yield generation_chunk(delta, call)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        chunks = list(self._stream(messages, stop, run_manager, **kwargs))
        return with_cut_calls(generate_from_stream(iter(chunks)), chunks)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        stream = self._astream(messages, stop, run_manager, **kwargs)
        chunks = [chunk async for chunk in stream]
        return with_cut_calls(generate_from_stream(iter(chunks)), chunks)

    def _answer(
        self,
        messages: list[dict[str, Any]],
        draft: list[dict[str, Any]] | None,
        call: Call,
        check: Callable[[], None] = lambda: None,
    ) -> Iterator[ChatDelta]:
        """Content, reasoning and tool calls; ``check`` is that of :meth:`_run`."""
        from rapid_llm.tools.answers import prepare

        decoder = self._decoder_for(call.engine.model)
        variables = {**decoder.chat_template_kwargs, **call.engine.chat_template_kwargs}
        prepared = prepare(decoder.tokenizer, messages, call.chat, variables)
        sampling = prepared.sampling(call.sampling)
        engine = replace(call.engine, chat_template_kwargs=prepared.chat_template_kwargs)
        reader = prepared.stream(decoder, sampling)
        for delta in self._run(
            messages, draft, call._replace(sampling=sampling, engine=engine), check
        ):
            yield reader.push(delta)

    def _call(self, stop: list[str] | None, arguments: Mapping[str, Any]) -> Call:
        rest = dict(arguments)
        chat = taken_options(rest)
        return super()._call(stop, rest)._replace(chat=chat)

    def _draft(self, kwargs: dict[str, Any]) -> list[dict[str, Any]] | None:
        messages = kwargs.pop("draft_messages", None)
        return None if messages is None else to_chat(self._convert_input(messages).to_messages())

    # --- retriever= ----------------------------------------------------------------------------
    # Retrieval comes before LangChain looks into its cache, so that both prompts are in the key.

    def generate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> LLMResult:
        """LangChain's; with a retriever, each chat is grounded first."""
        if not self._retrieves(kwargs):
            return super().generate(messages, stop, callbacks, **kwargs)
        config = beside({"callbacks": callbacks, **kwargs})
        results = []
        for chat in messages:
            grounded, found = self._ground(chat, config, kwargs)
            results.append(super().generate([grounded], stop, callbacks, **(kwargs | found)))
        return _joined(results)

    async def agenerate(
        self,
        messages: list[list[BaseMessage]],
        stop: list[str] | None = None,
        callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> LLMResult:
        """:meth:`generate` for asyncio."""
        if not self._retrieves(kwargs):
            return await super().agenerate(messages, stop, callbacks, **kwargs)
        config = beside({"callbacks": callbacks, **kwargs})
        results = []
        for chat in messages:
            grounded, found = await self._aground(chat, config, kwargs)
            results.append(await super().agenerate([grounded], stop, callbacks, **(kwargs | found)))
        return _joined(results)

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """LangChain's; with a retriever, the chat is grounded first."""
        if self._retrieves(kwargs):
            messages = self._convert_input(input).to_messages()
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
        if self._retrieves(kwargs):
            messages = self._convert_input(input).to_messages()
            input, found = await self._aground(messages, beside(config), kwargs)
            kwargs |= found
        async for chunk in super().astream(input, config, stop=stop, **kwargs):
            yield chunk

    def _retrieves(self, kwargs: dict[str, Any]) -> bool:
        """Whether the draft is still to be retrieved; what a call brings along goes first."""
        given = kwargs.get("draft_messages") is not None or kwargs.get("retrieved") is not None
        return self.retriever is not None and not given

    def _ground(
        self, messages: list[BaseMessage], config: RunnableConfig, arguments: Mapping[str, Any]
    ) -> tuple[list[BaseMessage], dict[str, Any]]:
        chunks = self._retrieve(search_query(messages), config)
        return self._with_contexts(messages, chunks, arguments)

    async def _aground(
        self, messages: list[BaseMessage], config: RunnableConfig, arguments: Mapping[str, Any]
    ) -> tuple[list[BaseMessage], dict[str, Any]]:
        chunks = await self._aretrieve(search_query(messages), config)
        return await in_thread(partial(self._with_contexts, messages, chunks, arguments))

    def _with_contexts(
        self, messages: list[BaseMessage], chunks: list[Document], arguments: Mapping[str, Any]
    ) -> tuple[list[BaseMessage], dict[str, Any]]:
        """The target's messages, and what tells a call of the drafter's and the documents'."""
        index = last_question(messages)
        contexts = self._contexts(chunks, text_of(messages[index]), arguments)

        def around(content: str) -> list[BaseMessage]:
            question = messages[index].model_copy(update={"content": content})
            return [*messages[:index], question, *messages[index + 1 :]]

        places = [{**place, "message": index} for place in contexts.found["documents_at"]]
        found = contexts.found | {"documents_at": places}
        if contexts.draft is not None:
            found["draft_messages"] = around(contexts.draft)
        return around(contexts.target), found

    # --- token counts --------------------------------------------------------------------------

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Tokens of a prompt as the model reads it, the chat template's included.

        A history that ends with an answer is counted with the opening of the next question, as it
        would be read then. What cannot be sent in this form (images, an order that no template
        takes) is counted as LangChain counts it, by the text alone. So any part of a history can be
        measured, as ``trim_messages`` and memories do.
        """
        if not messages:
            return 0
        if self.custom_get_token_ids is None:
            decoder = self._decoder_for(self.model)
            variables = {**decoder.chat_template_kwargs, **self.chat_template_kwargs}
            if tools:
                variables["tools"] = as_openai_tools(tools)
            with contextlib.suppress(InvalidParameterError):
                chat = to_chat(messages)
                if chat[-1]["role"] == "assistant":
                    chat.append({"role": "user", "content": ""})
                return len(Encoder(decoder.tokenizer, variables).chat(chat))
        return super().get_num_tokens_from_messages(messages)


def _joined(results: list[LLMResult]) -> LLMResult:
    return LLMResult(
        generations=[generations for result in results for generations in result.generations],
        llm_output={},
        run=[info for result in results for info in result.run or []] or None,
    )
