"""RAPID as a LlamaIndex LLM."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from llama_index.core.base.llms.generic_utils import (
    astream_completion_response_to_chat_response,
    completion_response_to_chat_response,
    stream_completion_response_to_chat_response,
)
from llama_index.core.base.llms.generic_utils import (
    messages_to_prompt as default_messages_to_prompt,
)
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
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM, default_completion_to_prompt
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.storage.docstore import BaseDocumentStore
from llama_index.core.types import TokenAsyncGen

from llama_index.llms.rapid.calls import Call, Options, alast_of, last_of
from llama_index.llms.rapid.catalog import DocumentKey
from llama_index.llms.rapid.counting import count_with
from llama_index.llms.rapid.documents import Library
from llama_index.llms.rapid.grounding import ground_text
from llama_index.llms.rapid.messages import as_dict, literal
from llama_index.llms.rapid.templates import (
    Context,
    FilledMessages,
    FilledPrompt,
    not_swallowed,
    refillable,
)
from llama_index.llms.rapid.windows import dropped, grounded_call, latest_turns, template_variables
from rapid_llm.chat import checked_variables
from rapid_llm.config import (
    Mode,
    OnEmpty,
    Quantization,
    SamplingParams,
    SpeculationConfig,
    from_options,
)
from rapid_llm.decoder import RapidDecoder
from rapid_llm.encoding import Prompt, encode_literal, encode_prompt
from rapid_llm.errors import InvalidParameterError
from rapid_llm.models import HUB_ACCESS

_OPTIONS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "stop",
    "seed",
    "gamma",
    "eta",
    "alpha",
    "mode",
)
"""The fields that are options of a generation; any of them may be given per call."""


class RapidLLM(LLM):
    """A target that reads whole documents, and a drafter that reads what was retrieved from them.

    The model is loaded at its first use (a call, or ``metadata``, which query engines ask for when
    they are built), once for all objects that name it.

    Where the drafter's prompt comes from:

    - ``complete(prompt, draft_prompt=…)`` and ``chat(messages, draft_messages=…)`` give it.
    - In a query or chat engine with ``documents=``, the prompt that the engine wrote, with the
      retrieved text, is the drafter's; the same prompt with the documents that hold the retrieved
      passages in the place of this text is the target's. What they do not say stays in it.
    - :class:`RapidSynthesizer` does the same with the documents that the nodes are from.
    - Otherwise there is none, and the target decodes plainly.

    ``complete`` on a model with a chat template sends the prompt as one user message, unless
    ``formatted=True`` or ``completion_to_prompt`` is given. ``system_prompt`` is used where
    LlamaIndex uses it: in engines, not in ``complete`` and ``chat``.

    A message or document cannot hold a control token: what looks like one is text. Finished
    prompts, taken with their control tokens, are what comes with ``formatted=True``, and what one's
    own ``completion_to_prompt`` and ``messages_to_prompt`` return.

    A chat that outgrows the window loses its oldest turns (``dropped_messages``), where it goes
    through the model's chat template.

    Every response has in ``raw``: ``usage`` (tokens of the target), ``finish_reason``, and
    ``rapid`` (see :class:`rapid_llm.Stats`; in engines also ``chunk_ids`` and ``document_ids``).

    Raises:
        InvalidParameterError: neither ``model`` nor ``decoder`` is given, or both; a value outside
            its range; an unknown option of a call.
        ContextWindowError: a prompt does not fit (in engines: :class:`PipelineError` from it).
        ModelError: the model cannot be loaded.
    """

    model_config = ConfigDict(extra="forbid")  # a misspelt parameter must not pass unseen

    model: str | None = Field(
        default=None,
        description="The target: hub id, folder, GGUF file, or smollm2-135m (packaged).",
    )
    drafter: str | None = Field(
        default=None, description="The drafter, of the same tokenizer; None: the target drafts."
    )
    documents: Any = Field(
        default=None,
        exclude=True,
        repr=False,
        description="What the target reads in query and chat engines: one text or Document, "
        "several Documents or a mapping (read are those that hold a retrieved passage), or a "
        "function of the retrieved text.",
    )
    document_key: Any = Field(
        default=None,
        exclude=True,
        description="Which Documents are parts of one document: those of one value of this "
        "metadata key, or of a function of a Document; None: those of one file_path.",
    )
    on_empty: OnEmpty = Field(
        default="empty",
        description="Where nothing was retrieved: empty does what LlamaIndex does, read_all lets "
        "the target read all documents.",
    )
    max_tokens: int = Field(default=256, description="Tokens to generate at most.")
    temperature: float = Field(
        default=SamplingParams.temperature, description="0 decodes greedily."
    )
    top_p: float = Field(default=SamplingParams.top_p, description="Nucleus mass in (0, 1].")
    top_k: int = Field(
        default=SamplingParams.top_k, description="Most likely tokens kept; 0 keeps all."
    )
    repetition_penalty: float | None = Field(
        default=SamplingParams.repetition_penalty,
        description="1 is none; None is what the model's generation_config says.",
    )
    stop: str | list[str] | None = Field(
        default=None, description="Strings that end the answer; they are cut from the text."
    )
    seed: int | None = Field(
        default=SamplingParams.seed, description="Seeds each call; None draws afresh."
    )
    gamma: int | Literal["auto"] = Field(
        default=SpeculationConfig.gamma,
        description="Tokens drafted a round; auto follows the measured costs and the acceptance.",
    )
    eta: float = Field(
        default=SpeculationConfig.eta, description="Strength of the knowledge transfer."
    )
    alpha: float = Field(
        default=SpeculationConfig.alpha,
        description="Tail protection: tokens with q < alpha * max(q) get no transfer.",
    )
    mode: Mode = Field(
        default=SpeculationConfig.mode,
        description="exact (the target's own distribution), augmented or paper.",
    )
    truncate: Literal["middle"] | None = Field(
        default=None,
        description="In engines: middle cuts documents that do not fit into the context window, "
        "around what was retrieved from them; None refuses them.",
    )
    dtype: str = Field(default="auto", description="Of both models; auto is the checkpoint's.")
    device: str | None = Field(
        default=None, description="Of the target; None takes CUDA if there is one."
    )
    drafter_device: str | None = Field(
        default=None, description="Of the drafter; None puts it beside the target."
    )
    drafter_quantization: Quantization | None = Field(
        default="auto",
        description="int8 drafts with int8 weights; auto does so where it pays; None never.",
    )
    kv_cache_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Of prompts' KV kept between calls; None is a quarter of the device's memory, "
        "0 is none.",
    )
    kv_cache_dir: str | None = Field(
        default=None,
        description="A folder that keeps the KV of long prompts across processes; None keeps it in "
        "memory only.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None,
        description="Variables of the model's chat template, such as enable_thinking; a call's own "
        "are added to them.",
    )
    hub_options: dict[str, Any] = Field(
        default_factory=dict,
        exclude=True,  # there may be a token in it
        repr=False,
        description="Options of from_pretrained, such as token, revision and cache_dir, of the "
        "target and of a drafter loaded by name.",
    )

    _decoder: RapidDecoder | None = PrivateAttr(default=None)
    _known: tuple[Any, DocumentKey | None, Library] | None = PrivateAttr(default=None)

    def __init__(
        self,
        model: str | Path | None = None,
        drafter: str | Path | None = None,
        *,
        decoder: RapidDecoder | None = None,
        kv_cache_dir: str | Path | None = None,
        **fields: Any,
    ) -> None:
        if (model is None) == (decoder is None):
            raise InvalidParameterError(
                "give either model= (a name) or decoder= (a loaded RapidDecoder), not both or none"
            )
        if decoder is not None:
            if drafter is not None:
                raise InvalidParameterError(
                    f"drafter={str(drafter)!r} cannot be added to a loaded decoder: give the "
                    "drafter to RapidDecoder"
                )
            model = decoder.target.name
            if named := sorted(HUB_ACCESS & fields.keys()):
                raise InvalidParameterError(
                    f"{named[0]} cannot be used for a loaded decoder: give it to "
                    "RapidDecoder.from_pretrained"
                )
        hub = {name: fields.pop(name) for name in HUB_ACCESS & fields.keys()}
        if hub:
            fields["hub_options"] = {**(fields.get("hub_options") or {}), **hub}
        paths = {"model": model, "drafter": drafter, "kv_cache_dir": kv_cache_dir}
        fields |= {name: None if path is None else str(path) for name, path in paths.items()}
        super().__init__(**fields)
        self._decoder = decoder
        self._options({})
        if isinstance(self.documents, BaseDocumentStore):
            raise InvalidParameterError(
                "a docstore cannot be RapidLLM(documents=...), which looks for the retrieved text "
                "in every document, and a docstore may hold chunks only: pass the list of "
                "documents, or give the docstore to RapidSynthesizer"
            )
        if self.documents is not None:
            Library(self.documents, self.document_key)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> RapidLLM:
        return self.model_copy()  # the weights are shared

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex serializes this class under."""
        return "RapidLLM"

    @property
    def decoder(self) -> RapidDecoder:
        """The models underneath; loads them if they are not yet (see :attr:`metadata`).

        Raises:
            ModelError: a model cannot be loaded.
        """
        if self._decoder is None:
            assert self.model is not None
            self._decoder = RapidDecoder.from_pretrained(
                self.model,
                self.drafter,
                dtype=self.dtype,
                device=self.device,
                drafter_device=self.drafter_device,
                drafter_quantization=self.drafter_quantization,
                kv_cache_bytes=self.kv_cache_bytes,
                kv_cache_dir=self.kv_cache_dir,
                **self.hub_options,
            )
            count_with(self._decoder.tokenizer)
        return self._decoder

    @property
    def _library(self) -> Library:
        """``documents``, which may have been set anew."""
        known = self._known
        if known is None or known[0] is not self.documents or known[1] != self.document_key:
            library = Library(self.documents, self.document_key)
            known = self._known = (self.documents, self.document_key, library)
        return known[2]

    @property
    def metadata(self) -> LLMMetadata:
        """The model's own window and whether it has a chat template; loads the model.

        Engines, splitters and memories that are built after this, or after the model was loaded,
        count in the model's tokens, unless ``Settings.tokenizer`` is set. ``num_output`` is what
        they keep free of the window: ``max_tokens``, but never more than half of it, and what the
        chat template adds.
        """
        count_with(self.decoder.tokenizer)
        window = self.decoder.target.context_window
        return LLMMetadata(
            context_window=window,
            num_output=min(self.max_tokens, window // 2) + self._template_tokens,
            is_chat_model=self._has_chat_template,
            model_name=str(self.model),
        )

    def to_payload(self) -> dict[str, Any]:
        """What callbacks and events are told about this LLM."""
        if self._decoder is None:  # they must not load the model, least of all in an event loop
            return {"class_name": self.class_name(), "model_name": str(self.model)}
        return super().to_payload()

    # --- complete ------------------------------------------------------------------------------

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Continue a prompt, which is not repeated in the answer.

        Args:
            prompt: sent as one user message if the model has a chat template.
            formatted: send the prompt as it is: it already holds the model's control tokens, and
                whatever in it looks like one is one.
            kwargs: ``draft_prompt`` (treated as the prompt is), ``chat_template_kwargs``, and any
                option of a generation.
        """
        with not_swallowed(prompt):
            return last_of(self._stream(self._completion_call(prompt, formatted, **kwargs)))

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """:meth:`complete`, a response a round; closing the generator stops the model."""
        with not_swallowed(prompt):
            return self._stream(self._completion_call(prompt, formatted, **kwargs))

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        """:meth:`complete` without blocking the event loop."""
        with not_swallowed(prompt):
            call = await asyncio.to_thread(self._completion_call, prompt, formatted, **kwargs)
            return await alast_of(self._astream(call))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """:meth:`stream_complete` without blocking the event loop."""
        with not_swallowed(prompt):
            call = await asyncio.to_thread(self._completion_call, prompt, formatted, **kwargs)
        return self._astream(call)

    # --- chat ----------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer messages through the model's chat template.

        Args:
            messages: of text. A model without a template gets them through
                ``messages_to_prompt``; one given to the constructor always goes first, and writes
                a finished prompt. The last one may be the assistant's, to be continued.
            kwargs: ``draft_messages``, ``chat_template_kwargs``, and any option of a generation.
        """
        with not_swallowed(messages):
            last = last_of(self._stream(self._chat_call(messages, **kwargs)))
        return completion_response_to_chat_response(last)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """:meth:`chat`, a response a round; closing the generator stops the model."""
        with not_swallowed(messages):
            responses = self._stream(self._chat_call(messages, **kwargs))
        return stream_completion_response_to_chat_response(responses)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """:meth:`chat` without blocking the event loop."""
        with not_swallowed(messages):
            call = await asyncio.to_thread(self._chat_call, messages, **kwargs)
            return completion_response_to_chat_response(await alast_of(self._astream(call)))

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """:meth:`stream_chat` without blocking the event loop."""
        with not_swallowed(messages):
            call = await asyncio.to_thread(self._chat_call, messages, **kwargs)
        return astream_completion_response_to_chat_response(self._astream(call))

    # --- predict, as engines call it -----------------------------------------------------------

    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """``LLM.apredict``, which would load the model in the event loop."""
        await asyncio.to_thread(lambda: self.decoder)
        # Unwrapped, because this method has its instrumentation span already.
        return cast(str, await inspect.unwrap(LLM.apredict)(self, prompt, **prompt_args))

    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        """``LLM.astream``, which would load the model in the event loop."""
        await asyncio.to_thread(lambda: self.decoder)
        return cast(TokenAsyncGen, await inspect.unwrap(LLM.astream)(self, prompt, **prompt_args))

    def _get_messages(self, prompt: BasePromptTemplate, **prompt_args: Any) -> list[ChatMessage]:
        fill = super()._get_messages
        return FilledMessages(*refillable(fill, prompt, prompt_args, self.documents is not None))

    def _get_prompt(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        fill = super()._get_prompt
        return FilledPrompt(*refillable(fill, prompt, prompt_args, self.documents is not None))

    # --- from LlamaIndex's arguments to the decoder's ------------------------------------------

    @property
    def _has_chat_template(self) -> bool:
        return bool(self.decoder.tokenizer.chat_template)

    @property
    def _template_tokens(self) -> int:
        """What the chat template adds to a user's message, alone or after the system's."""
        if not self._has_chat_template:
            return 0
        tokenizer = self.decoder.tokenizer
        variables = template_variables(self.decoder, self._options({}))
        system, user = ({"role": role, "content": "a"} for role in ("system", "user"))
        content = len(encode_literal("a", tokenizer))
        return max(
            len(encode_prompt(chat, tokenizer, variables)) - content * len(chat)
            for chat in ([user], [system, user])
        )

    def _options(self, given: Mapping[str, Any]) -> Options:
        call = dict(given)
        variables = checked_variables(self.chat_template_kwargs)
        variables |= checked_variables(call.pop("chat_template_kwargs", None))
        own = {name: getattr(self, name) for name in _OPTIONS}
        chosen = own | {k: v for k, v in call.items() if v is not None or k == "seed"}
        return Options(*from_options(chosen), variables)

    def _completion_call(
        self, prompt: str, formatted: bool, *, draft_prompt: str | None = None, **options: Any
    ) -> Call:
        chosen = self._options(options)
        if isinstance(prompt, FilledPrompt) and prompt.context is not None:
            fill = prompt.fill
            return self._grounded_call(
                lambda text: self._from_engine(fill(text)), prompt.context, chosen
            )
        if isinstance(prompt, FilledPrompt):  # an engine says formatted=True of any prompt
            return Call(self._from_engine(prompt), None, chosen)
        return Call(
            target=self._from_text(prompt, formatted),
            draft=None if draft_prompt is None else self._from_text(draft_prompt, formatted),
            options=chosen,
        )

    def _chat_call(
        self,
        messages: Sequence[ChatMessage],
        *,
        draft_messages: Sequence[ChatMessage] | None = None,
        **options: Any,
    ) -> Call:
        chosen = self._options(options)
        if isinstance(messages, FilledMessages) and messages.context is not None:
            fill = messages.fill
            return self._grounded_call(
                lambda text: self._from_messages(fill(text)), messages.context, chosen
            )
        decoder = self.decoder
        whole, draft = self._from_messages(messages), None
        target = latest_turns(whole, decoder, decoder.target, chosen)
        if draft_messages is not None:
            draft = self._from_messages(draft_messages)
            draft = latest_turns(draft, decoder, decoder.drafter, chosen)
        return Call(target, draft, chosen, notes={"dropped_messages": dropped(whole, target)})

    def _grounded_call(
        self, render: Callable[[str], Prompt], context: str, options: Options
    ) -> Call:
        """The prompt with the documents for the target, with the retrieved text for the drafter."""
        if isinstance(context, Context):
            retrieved, report = context.retrieved, context.report
        else:
            retrieved, report = ground_text(context, self._library, self.on_empty), {}
        return grounded_call(retrieved, render, self.decoder, options, self.truncate, report)

    def _from_text(self, prompt: str, formatted: bool) -> Prompt:
        if formatted:
            return prompt
        own = self.completion_to_prompt
        if own is not None and own is not default_completion_to_prompt:
            return own(prompt)
        if self._has_chat_template:
            return [{"role": "user", "content": prompt}]
        return literal(prompt, self.decoder.tokenizer)

    def _from_engine(self, prompt: str) -> Prompt:
        """What an engine wrote; only one's own functions write control tokens into it."""
        own = (self.completion_to_prompt, self.messages_to_prompt)
        defaults = (None, default_completion_to_prompt, default_messages_to_prompt)
        if all(function in defaults for function in own):
            return literal(prompt, self.decoder.tokenizer)
        return str(prompt)

    def _from_messages(self, messages: Sequence[ChatMessage]) -> Prompt:
        own = self.messages_to_prompt or default_messages_to_prompt
        if own is not default_messages_to_prompt:
            return own(messages)
        if self._has_chat_template:
            return [as_dict(message) for message in messages]
        return literal(own(messages), self.decoder.tokenizer)

    def _stream(self, call: Call) -> CompletionResponseGen:
        # The decoder checks the prompts in this call, so errors do not wait for the first token.
        return call.responses(self.decoder.stream(call.target, call.draft, **call.arguments))

    def _astream(self, call: Call) -> CompletionResponseAsyncGen:
        return call.aresponses(self.decoder.astream(call.target, call.draft, **call.arguments))
