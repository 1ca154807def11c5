"""RapidLLM: retrieval-augmented speculative decoding as an LLM of LlamaIndex."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.prompts import BasePromptTemplate

from llama_index.llms.rapid import loading
from llama_index.llms.rapid.calls import Call, alast_of, last_of
from llama_index.llms.rapid.catalog import DocumentKey
from llama_index.llms.rapid.chats import chat_call, taken_options
from llama_index.llms.rapid.counting import count_with
from llama_index.llms.rapid.documents import Library, require_whole
from llama_index.llms.rapid.fields import (
    KNOWN,
    WORDS,
    OptionFields,
    Options,
    as_fields,
    options_of_call,
)
from llama_index.llms.rapid.function_calling import ToolCalls
from llama_index.llms.rapid.grounding import ground_text
from llama_index.llms.rapid.messages import PromptWriter
from llama_index.llms.rapid.prediction import Predictions
from llama_index.llms.rapid.statistics import reports, retrieval_confidence, watch_engines
from llama_index.llms.rapid.templates import (
    Context,
    FilledMessages,
    FilledPrompt,
    not_swallowed,
    refillable,
)
from llama_index.llms.rapid.windows import grounded_call, template_variables
from rapid_llm.aio import in_thread
from rapid_llm.config import EngineConfig
from rapid_llm.field_help import with_field_help
from rapid_llm.given_models import not_for_given, not_the_model
from rapid_llm.loaded_decoders import LoadedDecoders
from rapid_llm.old_names import refuse_old_names
from rapid_llm.options import without_secrets
from rapid_llm.remote import RemoteDecoder

if TYPE_CHECKING:
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.encoding import Prompt


@with_field_help
class RapidLLM(OptionFields, Predictions, ToolCalls):
    """A target that reads whole documents, and a drafter that reads the text retrieved from them.

    Its fields are the options of :mod:`rapid_llm.config`, listed below. Arguments of
    ``from_pretrained`` for access to a hub (``token``, ``revision``, …) may be given directly.
    Arguments of a call override the fields, except those that belong to loaded models. None leaves
    the field's value, except where None is a value (``seed``, ``timeout``, ``truncate``,
    ``repetition_penalty``).

    The model is loaded at its first use (a call, or ``metadata``, which query engines ask for when
    they are built), once for all objects that name it.

    Sources of the drafter's prompt:

    - ``complete(prompt, draft_prompt=…)`` and ``chat(messages, draft_messages=…)`` give it.
    - In a query or chat engine with ``documents=``, it is the engine's prompt with the retrieved
      text. The target's prompt has the documents that contain the retrieved passages in the place
      of this text, followed by retrieved text that they do not contain.
    - :class:`RapidSynthesizer` does the same with the documents of the retrieved nodes.
    - Otherwise there is none, and the target decodes plainly.

    ``complete`` on a model with a chat template sends the prompt as one user message, unless
    ``formatted=True`` or ``completion_to_prompt`` is given. ``system_prompt`` is used where
    LlamaIndex uses it: in engines, not in ``complete`` and ``chat``.

    Control tokens in messages and documents are ordinary text. They steer the model in finished
    prompts only: those with ``formatted=True``, and the results of the user's own
    ``completion_to_prompt`` and ``messages_to_prompt``.

    A chat that exceeds the context window loses its oldest turns (``dropped_messages``), if it goes
    through the model's chat template.

    Every response has in ``raw``: ``usage`` (tokens of the target), ``finish_reason``, and
    ``rapid`` (see :class:`rapid_llm.Stats`; in engines also ``chunk_ids`` and ``document_ids``).
    With ``documents=``, an engine's response has ``rapid`` in its ``metadata``.

    Args:
        model: name of the target; by default the packaged model.
        drafter: name of another model that drafts.
        decoder: loaded models in the place of named ones, or those of a server (``base_url``); not
            with options that belong to loaded models, or the name of another model.
        preload: whether to load the models when the object is made, not at its first use.
        fields: other fields by name.

    Raises:
        InvalidParameterError: an option that cannot be used with ``decoder``, or that a call does
            not take; a value outside its range.
        ContextWindowError: a prompt does not fit (in engines: :class:`PipelineError` from it).
        ModelError: the model cannot be loaded.
    """

    model_config = ConfigDict(extra="forbid")  # refuses misspelt parameters

    documents: Any = Field(
        default=None,
        exclude=True,
        repr=False,
        description="Documents of the target in query and chat engines: one text or Document; "
        "several Documents or a mapping, of which it reads those that contain a retrieved passage; "
        "or a function of the retrieved text.",
    )
    document_key: Any = Field(
        default=None,
        exclude=True,
        description="Metadata key, or function of a Document, with equal values for Documents that "
        "are parts of one; by default file_path.",
    )

    _loaded: LoadedDecoders = PrivateAttr(default_factory=LoadedDecoders)
    _given: tuple[EngineConfig | None, Any] = PrivateAttr(default=(None, None))
    _known: tuple[Any, DocumentKey | None, Library] | None = PrivateAttr(default=None)

    def __init__(
        self,
        model: str | Path | None = None,
        drafter: str | Path | None = None,
        *,
        decoder: RapidDecoder | RemoteDecoder | None = None,
        preload: bool = False,
        **fields: Any,
    ) -> None:
        refuse_old_names(fields, KNOWN)
        fields |= {"model": model, "drafter": drafter}
        options = {name: fields.pop(name) for name in WORDS & fields.keys()}
        hub = loading.take_hub_access(fields, type(self).model_fields)
        if decoder is None:
            decoder = loading.on_server(fields)
        if decoder is not None and hub:
            raise not_for_given(min(hub), decoder)
        options["hub_options"] = {**(options.get("hub_options") or {}), **hub}
        given = as_fields(options)
        if decoder is not None:
            loading.require_loaded(decoder, given)
            given["model"] = decoder.target.name
        super().__init__(**fields, **given)
        if decoder is not None:
            self._given = loading.of_models(self._options({}).engine, own=True), decoder
        if self.documents is not None:
            require_whole(self.documents)
            Library(self.documents, self.document_key)
        watch_engines()
        if preload:
            self.load()

    def load(self) -> RapidLLM:
        """Load the models now instead of at the first call.

        Raises:
            ModelError: a model cannot be loaded.
        """
        self._decoder_for(self._options({}).engine)
        return self

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> RapidLLM:
        options = {name: getattr(self, name) for name in OptionFields.model_fields}
        return self.model_copy(update=copy.deepcopy(options))  # weights and documents are shared

    def __getstate__(self) -> dict[str, Any]:
        private = [name for name, each in KNOWN.items() if each.option.private]
        # Without secrets; where the pickle is opened, the environment has the token.
        bare = self.model_copy(update={n: without_secrets(getattr(self, n)) for n in private})
        bare._known = bare.api_key = None
        return super(RapidLLM, bare).__getstate__()

    def __setstate__(self, state: dict[Any, Any]) -> None:
        # LlamaIndex's method would build a new object from the fields, without the decoder.
        BaseModel.__setstate__(self, state)

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex serializes this class under."""
        return "RapidLLM"

    @property
    def decoder(self) -> RapidDecoder:
        """The loaded models; loads them at the first use (see :attr:`metadata`).

        Raises:
            ModelError: a model cannot be loaded.
        """
        return self._decoder_for(self._options({}).engine)

    def _decoder_for(self, engine: EngineConfig) -> RapidDecoder:
        """The models of a call: those that were given, or loaded ones."""
        own = engine.model == self.model
        if not own and isinstance(self._given[1], RemoteDecoder):
            raise not_the_model(engine.model, self._given[1])
        wanted = loading.of_models(engine, own=own)
        load = partial(loading.load, own=own)
        return self._given_for(wanted) or self._loaded.get(wanted, load)

    def _given_for(self, wanted: EngineConfig) -> RapidDecoder | None:
        options, decoder = self._given
        return cast("RapidDecoder", decoder) if options == wanted else None

    @property
    def _library(self) -> Library:
        """The library of ``documents``, which may have been replaced."""
        known = self._known
        if known is None or known[0] is not self.documents or known[1] != self.document_key:
            library = Library(self.documents, self.document_key)
            known = self._known = (self.documents, self.document_key, library)
        return known[2]

    @property
    def metadata(self) -> LLMMetadata:
        """Context window of the model, and whether it has a chat template; loads the model.

        Engines, splitters and memories that are built afterwards count in the model's tokens,
        unless ``Settings.tokenizer`` is set. ``num_output``, the number of tokens that they keep
        free, is ``max_tokens``, at most half of the window, plus the tokens that the chat template
        adds.
        """
        decoder = self.decoder
        count_with(decoder.tokenizer)
        window, writer = decoder.target.context_window, self._writer(decoder)
        beside = writer.template_tokens(template_variables(decoder, self._options({})))
        return LLMMetadata(
            context_window=window,
            num_output=min(self.max_tokens, window // 2) + beside,
            is_chat_model=writer.has_template,
            is_function_calling_model=writer.shows_tools,
            model_name=self.model,
        )

    def to_payload(self) -> dict[str, Any]:
        """Description of this LLM for callbacks and events."""
        wanted = loading.of_models(self._options({}).engine, own=True)
        if self._given_for(wanted) is None and self._loaded.find(wanted) is None:
            # Callbacks must not load the model, least of all in an event loop.
            return {"class_name": self.class_name(), "model_name": self.model}
        return super().to_payload()

    # --- complete ------------------------------------------------------------------------------

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Continue a prompt, which is not repeated in the answer.

        Args:
            prompt: prompt, sent as one user message if the model has a chat template.
            formatted: whether the prompt is finished: it is sent unchanged, and its control tokens
                steer the model.
            kwargs: ``draft_prompt`` (treated like the prompt), and options of a call.
        """
        with not_swallowed(prompt):
            return last_of(self._completion_call(prompt, formatted, **kwargs).stream())

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """Stream :meth:`complete`, a response per round; closing the generator stops the model."""
        with not_swallowed(prompt):
            return self._completion_call(prompt, formatted, **kwargs).stream()

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        """:meth:`complete` without blocking the event loop."""
        with not_swallowed(prompt):
            call = await in_thread(partial(self._completion_call, prompt, formatted, **kwargs))
            return await alast_of(call.astream())

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """:meth:`stream_complete` without blocking the event loop."""
        with not_swallowed(prompt):
            call = await in_thread(partial(self._completion_call, prompt, formatted, **kwargs))
        return call.astream()

    # --- chat ----------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer messages through the model's chat template.

        Args:
            messages: messages of text, tool calls and their results. A model without a template
                gets them through ``messages_to_prompt``; the user's own one takes precedence over a
                template, and writes a finished prompt. A last message of the assistant is
                continued.
            kwargs: ``draft_messages``, and options of a call; ``tools``, ``tool_choice``,
                ``parallel_tool_calls`` and ``response_format`` in OpenAI's form.
        """
        with not_swallowed(messages):
            return last_of(self._chat_call(messages, **kwargs).stream())

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Stream :meth:`chat`, a response per round; closing the generator stops the model."""
        with not_swallowed(messages):
            return self._chat_call(messages, **kwargs).stream()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """:meth:`chat` without blocking the event loop."""
        with not_swallowed(messages):
            call = await in_thread(partial(self._chat_call, messages, **kwargs))
            return await alast_of(call.astream())

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """:meth:`stream_chat` without blocking the event loop."""
        with not_swallowed(messages):
            call = await in_thread(partial(self._chat_call, messages, **kwargs))
        return call.astream()

    # --- from LlamaIndex's arguments to the decoder's ------------------------------------------

    def _get_messages(self, prompt: BasePromptTemplate, **prompt_args: Any) -> list[ChatMessage]:
        fill = super()._get_messages
        return FilledMessages(*refillable(fill, prompt, prompt_args, self.documents is not None))

    def _get_prompt(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        fill = super()._get_prompt
        return FilledPrompt(*refillable(fill, prompt, prompt_args, self.documents is not None))

    def _options(self, call: Mapping[str, Any]) -> Options:
        return options_of_call(self, call)

    def _writer(self, decoder: RapidDecoder) -> PromptWriter:
        return PromptWriter(decoder.tokenizer, self.messages_to_prompt, self.completion_to_prompt)

    def _completion_call(
        self, prompt: str, formatted: bool, *, draft_prompt: str | None = None, **options: Any
    ) -> Call[CompletionResponse]:
        chosen = self._options(options)
        decoder = self._decoder_for(chosen.engine)
        writer = self._writer(decoder)
        if isinstance(prompt, FilledPrompt) and prompt.context is not None:
            fill = prompt.fill
            return self._grounded_call(
                decoder, lambda text: writer.from_engine(fill(text)), prompt.context, chosen
            )
        if isinstance(prompt, FilledPrompt):  # engines pass formatted=True for any prompt
            target, answers = writer.from_engine(prompt), reports(filled=True)
            return Call(decoder, target, None, chosen, reports=answers)
        draft = None if draft_prompt is None else writer.from_text(draft_prompt, formatted)
        target = writer.from_text(prompt, formatted)
        return Call(decoder, target, draft, chosen)

    def _chat_call(
        self,
        messages: Sequence[ChatMessage],
        *,
        draft_messages: Sequence[ChatMessage] | None = None,
        **options: Any,
    ) -> Call[ChatResponse]:
        asked = taken_options(options)
        chosen = self._options(options)
        decoder = self._decoder_for(chosen.engine)
        writer, grounded = self._writer(decoder), partial(self._grounded_call, decoder)
        return chat_call(messages, draft_messages, asked, chosen, decoder, writer, grounded)

    def _grounded_call(
        self,
        decoder: RapidDecoder,
        render: Callable[[str], Prompt],
        context: str,
        options: Options,
    ) -> Call[Any]:
        """Call with the documents in the target's prompt, the retrieved text in the drafter's."""
        if isinstance(context, Context):
            answers = (context.report, *reports())
            return grounded_call(context.retrieved, render, decoder, options, answers)
        on_empty, order = options.retrieval.on_empty, options.retrieval.order
        retrieved = ground_text(context, self._library, on_empty, retrieval_confidence(), order)
        return grounded_call(retrieved, render, decoder, options, reports())
