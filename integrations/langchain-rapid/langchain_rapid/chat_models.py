"""ChatRapid: a chat model whose drafter reads retrieved chunks and whose target whole documents."""

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
)
from langchain_core.language_models import LangSmithParams, LanguageModelInput
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from pydantic import BaseModel, ConfigDict, model_validator
from rapid_llm.aio import iterate_in_thread
from rapid_llm.errors import InvalidParameterError
from typing_extensions import Self

from langchain_rapid.encoding import Encoder
from langchain_rapid.messages import require_read, to_chat
from langchain_rapid.options import Call
from langchain_rapid.retrieving import RetrievingChat
from langchain_rapid.runs import child_of
from langchain_rapid.settings import VERSION
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
)

if TYPE_CHECKING:
    from rapid_llm.tools.answers import ChatDelta
    from rapid_llm.tools.calls import ToolCallDelta


class ChatRapid(RetrievingChat):
    """Chat model with retrieval-augmented speculative decoding.

    The messages are the target's prompt. The drafter's comes from one of four places:

    - :func:`create_rapid_documents_chain`, in the place of ``create_stuff_documents_chain``;
    - ``retriever=`` and ``documents=``: the last human message is the question; the retriever gets
      it with the two before it, because a follow-up alone says too little;
    - results of tools with documents as their artifact; with ``documents=`` the target reads the
      whole documents that they come from (:mod:`langchain_rapid.conversations`);
    - ``draft_messages=`` of a call, or bound by ``bind``.

    Without one the target decodes plainly. Arguments of a call override the fields of the same
    names, except those that load models. None leaves a field's value, but ``seed=None`` is a random
    seed. ``confidence=`` of a call is the confidence of the draft's retrieval, in [0, 1], for
    ``dynamic_eta``.

    Example:
        ```python
        llm = ChatRapid(model="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16")
        llm.invoke("Hello", max_tokens=20)
        ```

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
        """The model with arguments for every call, kept when tools or a schema are bound too."""
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
        """The model with tools that it may or must call.

        A call that the model begins names one of the tools, with arguments of its schema.

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
        if self.decoder is not None:  # a profile does not load the model
            profile["max_input_tokens"] = self.decoder.target.context_window
        return profile

    # --- generation ----------------------------------------------------------------------------

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        if self._is_ungrounded(messages, kwargs):  # not retrieved before, in stream_events (v3)
            messages, found = self._ground(messages, child_of(run_manager, CallbackManager), kwargs)
            kwargs |= found
        draft = self._draft(kwargs)
        call = self._call(stop, kwargs)
        if draft is None:
            require_read(self.documents, messages, call)
        calls: list[ToolCallDelta] = []
        for delta in self._answer(to_chat(messages), draft, call):
            calls += delta.tool_calls
            if says_something(delta):
                yield generation_chunk(delta, call, calls)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        if self._is_ungrounded(messages, kwargs):
            child = child_of(run_manager, AsyncCallbackManager)
            messages, found = await self._aground(messages, child, kwargs)
            kwargs |= found
        draft = self._draft(kwargs)
        call = self._call(stop, kwargs)
        if draft is None:
            require_read(self.documents, messages, call)
        chat = to_chat(messages)
        calls: list[ToolCallDelta] = []
        deltas = iterate_in_thread(partial(self._answer, chat, draft, call))
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                calls += delta.tool_calls
                if says_something(delta):
                    yield generation_chunk(delta, call, calls)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        stream = self._astream(messages, stop, run_manager, **kwargs)
        return generate_from_stream(iter([chunk async for chunk in stream]))

    def _answer(
        self,
        messages: list[dict[str, Any]],
        draft: list[dict[str, Any]] | None,
        call: Call,
        check: Callable[[], None] = lambda: None,
    ) -> Iterator[ChatDelta]:
        """Deltas of content, reasoning and tool calls; ``check`` as for :meth:`_run`."""
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

    # --- token counts --------------------------------------------------------------------------

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Number of tokens of a prompt as the model reads it, including the chat template's.

        A history that ends with an answer is counted with the opening of the next question.
        Messages that the model cannot be sent (images, an order that no template takes) are counted
        as LangChain counts them, by their text. So any part of a history can be counted, as
        ``trim_messages`` and memories do.
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
