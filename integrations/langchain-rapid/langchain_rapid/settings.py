"""What ChatRapid and RapidLLM have in common: their fields, and running the decoder."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from langchain_core.documents import Document
from langchain_core.language_models import LangSmithParams
from langchain_core.runnables import Runnable, RunnableConfig
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SkipValidation,
    field_validator,
    model_validator,
)
from rapid_llm.aio import iterate_in_thread
from rapid_llm.config import (
    Mode,
    OnEmpty,
    Quantization,
    SamplingParams,
    SpeculationConfig,
    from_options,
)
from rapid_llm.errors import InvalidParameterError
from typing_extensions import Self

from langchain_rapid import hub
from langchain_rapid.documents import SEPARATOR, FullDocuments
from langchain_rapid.encoding import Written
from langchain_rapid.errors import GenerationTimeoutError, RetrievalError
from langchain_rapid.window import Place, encoded, places_of

if TYPE_CHECKING:
    from rapid_llm.decoder import Chunk, RapidDecoder
else:  # importing them would import torch
    RapidDecoder = Any

try:
    VERSION = version("langchain-rapid")
except PackageNotFoundError:  # run from a source tree that was not installed
    VERSION = "0+unknown"

_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed")
_SPECULATION = ("gamma", "eta", "alpha", "mode")
_PLACEMENT = ("model", "drafter", "dtype", "device", "drafter_device", "drafter_quantization")
_KEPT = ("kv_cache_bytes", "kv_cache_dir")
_LIMITS = ("timeout", "truncate")

# LangChain's standard parameters of hosted models: here is no key to give and nothing to retry.
_HOSTED = ("api_key", "max_retries")


class Call(NamedTuple):
    """One generation's settings: the fields, overridden by what the call was given.

    Attributes:
        retrieved: of each retrieved chunk what is known of it; None if nothing was asked for.
        places: where documents stand in the target's prompt.
        formatted: a text prompt's control tokens steer the model.
    """

    model: str
    sampling: SamplingParams
    speculation: SpeculationConfig
    timeout: float | None
    truncate: Literal["middle"] | None
    chat_template_kwargs: dict[str, Any]
    retrieved: list[dict[str, Any]] | None
    places: list[Place]
    formatted: bool = False


class Contexts(NamedTuple):
    """What both models are to read; no draft if nothing was retrieved."""

    target: str
    draft: str | None
    retrieved: list[dict[str, Any]]
    places: list[Place]


class RapidModel(BaseModel):
    """The fields of both classes, and how they are used.

    Nothing is loaded, and torch is not imported, before the first token is asked for.
    """

    # Errors do not show what was given, as a token may be among it.
    model_config = ConfigDict(arbitrary_types_allowed=True, hide_input_in_errors=True)

    model: str = "smollm2-135m"
    """Target: a hub id, a folder, a GGUF file, or the packaged model. A call may name another."""
    drafter: str | None = None
    """Drafter: the same, with the target's tokenizer. None: the target drafts for itself."""
    dtype: str = "auto"
    """``auto`` (the checkpoint's own), ``bfloat16``, ``float16`` or ``float32``."""
    device: str | None = None
    """Of the target, such as ``cuda:0``; None takes CUDA if there is one."""
    drafter_device: str | None = None
    """Of the drafter; None puts it beside the target."""
    drafter_quantization: Quantization | None = "auto"
    """``int8`` drafts with int8 weights; ``auto`` does so where it pays; None never."""
    kv_cache_bytes: int | None = Field(default=None, ge=0)
    """Of prompts' KV kept between calls; None is a quarter of the device's memory, 0 is none."""
    kv_cache_dir: str | None = None
    """A folder that keeps the KV of long prompts across processes; None keeps it in memory only."""
    hub_options: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    """For ``from_pretrained`` of the models: ``revision``, ``token``, ``cache_dir`` (which may
    stand by themselves as well), ``trust_remote_code``, …"""
    decoder: RapidDecoder | None = Field(default=None, exclude=True, repr=False)
    """A loaded decoder, in place of the fields above."""

    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the model's chat template, such as ``{"enable_thinking": False}``. A call's go
    before these, name by name."""
    max_tokens: int = 256
    """Tokens to generate at most; fewer where the context window leaves no more."""
    temperature: float = 0.0
    """0 decodes greedily."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]; 1 keeps every token."""
    top_k: int = 0
    """Number of most likely tokens kept; 0 keeps all."""
    repetition_penalty: float | None = None
    """Above 0; 1 is none; None is what the model's ``generation_config`` says."""
    stop: list[str] | None = None
    """Strings that end the answer and are cut from it. Those of a call replace these."""
    seed: int | None = None
    """Makes sampling reproducible; None draws afresh."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds for reading the prompts and generating, after which the call fails; None waits."""

    gamma: int | Literal["auto"] = "auto"
    """Tokens drafted a round (γ); ``auto`` follows the measured costs and the acceptance."""
    eta: float = 10.0
    """Strength of the knowledge transfer (η); 0 is lossless speculation."""
    alpha: float = 0.1
    """Tail protection: drafted tokens with q < alpha * max(q) get no transfer."""
    mode: Mode = "paper"
    """Whose distribution the answer follows: ``exact``, ``augmented`` or ``paper``."""

    truncate: Literal["middle"] | None = None
    """What happens to a prompt that exceeds the context window. ``middle`` cuts the documents
    around what was retrieved from them, or the middle of a message that is most of the prompt;
    where that is not enough, a chat loses its oldest turns. None refuses such a prompt."""
    retriever: Runnable[str, list[Document]] | None = Field(default=None, exclude=True, repr=False)
    """With ``documents``: finds the drafter's context for the last human message."""
    documents: Annotated[Any, SkipValidation] = Field(default=None, exclude=True, repr=False)
    """With ``retriever``: the full texts for the target: a string, a mapping from document id to
    text, a list of Document, or a function from document id to text."""
    document_id_key: str | None = None
    """Key of the chunks' metadata that holds the document's id; None tries ``document_id``,
    ``doc_id`` and ``source``."""
    on_empty: OnEmpty = "empty"
    """Where the retriever finds nothing: ``empty`` leaves the context empty, ``read_all`` has the
    target read every document."""

    _loaded: dict[str, RapidDecoder] = PrivateAttr(default_factory=dict)
    _sources: FullDocuments | None = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        """Pass on to LangChain's own, which pydantic's for private attributes would hide."""
        super().model_post_init(context)

    @model_validator(mode="before")
    @classmethod
    def _take_parameters_of_hosted_models(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return hub.gathered({k: value for k, value in values.items() if k not in _HOSTED})

    @field_validator("model", "drafter", "kv_cache_dir", mode="before")
    @classmethod
    def _path_to_str(cls, value: Any) -> Any:
        return str(value) if isinstance(value, PurePath) else value

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        if self.decoder is not None:
            self._take_names_of_decoder()
        if (self.retriever is None) != (self.documents is None):
            given, missing = ("retriever", "documents")[:: 1 if self.documents is None else -1]
            raise InvalidParameterError(
                f"{given}= was given without {missing}=: the retriever finds the drafter's "
                "context, the documents are the target's; pass both or neither"
            )
        hub.require_own(self.hub_options, (*_PLACEMENT, *_KEPT, "chat_template_kwargs"))
        if self.documents is not None:
            self._sources = FullDocuments(self.documents, self.document_id_key)
        self._call(None, {})  # refuses values outside their range
        return self

    def _take_names_of_decoder(self) -> None:
        """So that traces and cache keys tell one decoder from another."""
        from rapid_llm.decoder import RapidDecoder  # imported already, by who made the decoder

        if not isinstance(self.decoder, RapidDecoder):
            raise InvalidParameterError(
                f"decoder of type {type(self.decoder).__name__} is not allowed: pass a "
                "rapid_llm.RapidDecoder"
            )
        name = self.decoder.target.name
        if "model" in self.model_fields_set and self.model != name:
            raise InvalidParameterError(
                f"model={self.model!r} and a decoder of {name!r} were given; pass one of them"
            )
        self.model = name
        if self.decoder.drafter is not self.decoder.target:
            self.drafter = self.decoder.drafter.name

    # --- one call ------------------------------------------------------------------------------

    def _call(self, stop: list[str] | None, options: Mapping[str, Any]) -> Call:
        """Merge the fields with what a call was given.

        Raises:
            InvalidParameterError: an unknown option, or a value outside its range.
        """
        settings = {name: getattr(self, name) for name in (*_SAMPLING, *_SPECULATION, *_LIMITS)}
        settings |= {"model": self.model, "retrieved": None, "documents_at": []}
        # None leaves a setting as it is, but for the seed, where it is a value of its own.
        settings |= {k: v for k, v in options.items() if v is not None or k == "seed"}
        if stop is not None:
            settings["stop"] = stop
        settings.pop("stream", None)  # LangChain's own; how we are called says it already
        model, retrieved = settings.pop("model"), settings.pop("retrieved")
        timeout, truncate = settings.pop("timeout"), settings.pop("truncate")
        variables, places = settings.pop("chat_template_kwargs", {}), settings.pop("documents_at")
        if timeout is not None and not timeout > 0:
            raise InvalidParameterError(f"timeout={timeout!r} is not allowed: pass seconds above 0")
        if truncate not in ("middle", None):
            raise InvalidParameterError(
                f"truncate={truncate!r} is not allowed: truncate must be 'middle' or None"
            )
        if not isinstance(variables, Mapping):
            raise InvalidParameterError(
                f"chat_template_kwargs={variables!r} is not allowed: pass a mapping from the "
                "template's variables to values"
            )
        sampling, speculation = from_options(settings)
        return Call(
            model=str(model),
            sampling=sampling,
            speculation=speculation,
            timeout=timeout,
            truncate=truncate,
            chat_template_kwargs={**self.chat_template_kwargs, **variables},
            retrieved=retrieved,
            places=places,
        )

    def _decoder_for(self, model: str) -> RapidDecoder:
        """The decoder, loaded when first needed; objects with the same models share weights."""
        if self.decoder is not None and model == self.model:
            return self.decoder
        decoder = self._loaded.get(model)
        if decoder is None:
            from rapid_llm.decoder import RapidDecoder

            decoder = RapidDecoder.from_pretrained(
                model,
                self.drafter,
                dtype=self.dtype,
                device=self.device,
                drafter_device=self.drafter_device,
                drafter_quantization=self.drafter_quantization,
                kv_cache_bytes=self.kv_cache_bytes,
                kv_cache_dir=self.kv_cache_dir,
                **hub.for_loading(self.hub_options, other_model=model != self.model),
            )
            self._loaded[model] = decoder
        return decoder

    def _run(
        self,
        target: Written,
        draft: Written | None,
        call: Call,
        check: Callable[[], None] = lambda: None,
    ) -> Iterator[Chunk]:
        """Generate; ``check`` is called during prefill and may stop it by raising."""
        decoder = self._decoder_for(call.model)
        started = time.monotonic()
        tokens = 0

        def proceed(*_: object) -> None:
            check()
            if call.timeout is not None and time.monotonic() - started > call.timeout:
                raise GenerationTimeoutError(
                    f"timeout={call.timeout:g} s passed after {tokens} of at most "
                    f"{call.sampling.max_new_tokens} tokens: raise the timeout, lower max_tokens, "
                    "or shorten the prompt"
                )

        prompts = encoded(target, draft, decoder, call)
        for chunk in decoder.stream(
            prompts.target,
            prompts.draft,
            sampling=call.sampling,
            speculation=call.speculation,
            progress=proceed,
        ):
            tokens += len(chunk.token_ids)
            chunk.stats.omitted_tokens = prompts.omitted_tokens
            if chunk.finish_reason is None:
                proceed()
            yield chunk

    async def _arun(
        self, target: Written, draft: Written | None, call: Call
    ) -> AsyncIterator[Chunk]:
        """The same in worker threads, loading included; cancelled within one round."""
        async for chunk in iterate_in_thread(lambda check: self._run(target, draft, call, check)):
            yield chunk

    # --- retrieval -----------------------------------------------------------------------------

    def _retrieve(self, question: str, config: RunnableConfig) -> list[Document]:
        assert self.retriever is not None
        try:
            return self.retriever.invoke(question, config)
        except Exception as error:
            raise _retrieval_error(error) from error

    async def _aretrieve(self, question: str, config: RunnableConfig) -> list[Document]:
        assert self.retriever is not None
        try:
            return await self.retriever.ainvoke(question, config)
        except Exception as error:
            raise _retrieval_error(error) from error

    def _contexts(self, chunks: list[Document], question: str) -> Contexts:
        """What both models are to read of the retrieved chunks and the documents behind them."""
        from rapid_llm.context.prompts import INSTRUCTION, build_messages

        from langchain_rapid.grounding import find_sources

        assert self._sources is not None

        def message(texts: list[str]) -> str:
            if not texts:
                return f"{INSTRUCTION}\n\nQuestion: {question}"
            return build_messages(SEPARATOR.join(texts), question)[0]["content"]

        found = find_sources(chunks, self._sources, on_empty=self.on_empty)
        full = [source.document.page_content for source in found.full]
        target = message(full)
        return Contexts(
            target,
            message([chunk.page_content for chunk in found.chunks]) if found.chunks else None,
            found.retrieved,
            places_of(found.full, full, SEPARATOR, [target]),
        )

    # --- what LangChain asks for ---------------------------------------------------------------

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = (*_PLACEMENT, *_SAMPLING, *_SPECULATION, *_LIMITS)
        # Under a name of its own, as a call's chat_template_kwargs come beside it in a cache key.
        template = self.decoder.chat_template_kwargs if self.decoder is not None else {}
        return {name: getattr(self, name) for name in names} | {
            "hub_options": hub.identifying(self.hub_options),
            "chat_template_defaults": template | self.chat_template_kwargs,
        }

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text under the model's tokenizer, without BOS or EOS."""
        from rapid_llm.encoding import encode_literal

        custom: Callable[[str], list[int]] | None = getattr(self, "custom_get_token_ids", None)
        if custom is not None:
            return custom(text)
        return encode_literal(text, self._decoder_for(self.model).tokenizer)

    def _tracing_params(
        self, kind: Literal["chat", "llm"], stop: list[str] | None, call: Mapping[str, Any]
    ) -> LangSmithParams:
        given = {name: value for name, value in call.items() if value is not None}
        params = LangSmithParams(
            ls_provider="rapid",
            ls_model_type=kind,
            ls_model_name=str(given.get("model", self.model)),
            ls_temperature=given.get("temperature", self.temperature),
            ls_max_tokens=given.get("max_tokens", self.max_tokens),
        )
        if stop := self.stop if stop is None else stop:
            params["ls_stop"] = stop
        return params


def _retrieval_error(error: Exception) -> RetrievalError:
    return RetrievalError(
        f"the retriever failed with {type(error).__name__}: {error}; repair it, or ask without "
        "retriever="
    )
