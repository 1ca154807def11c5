"""Base class of ChatRapid and RapidLLM: fields, loading of models, retrieval and generation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from langchain_core.documents import Document
from langchain_core.language_models import LangSmithParams
from langchain_core.runnables import Runnable, RunnableConfig
from pydantic import ConfigDict, Field, PrivateAttr, SkipValidation, model_validator
from rapid_llm.aio import iterate_in_thread
from rapid_llm.config import EngineConfig, RetrievalConfig
from rapid_llm.context.retrieved import SEPARATOR
from rapid_llm.errors import InvalidParameterError
from rapid_llm.field_help import with_field_help
from rapid_llm.given_models import not_the_model
from rapid_llm.loaded_decoders import LoadedDecoders
from rapid_llm.old_names import refuse_old_names
from rapid_llm.options import options_of, require, without_secrets
from typing_extensions import Self

from langchain_rapid import hub
from langchain_rapid.batches import AT_ONCE
from langchain_rapid.documents import FullDocuments
from langchain_rapid.encoding import Written
from langchain_rapid.errors import RetrievalError
from langchain_rapid.loading import names_of_decoder, on_server
from langchain_rapid.options import (
    OPTIONS,
    Call,
    OptionFields,
    OptionsSchema,
    by_field,
    overrides,
    require_one_name,
    settings,
    without_none,
)
from langchain_rapid.places import Place
from langchain_rapid.window import encoded, places_of

if TYPE_CHECKING:
    from rapid_llm.decoder import Delta, RapidDecoder
else:  # importing them would import torch
    RapidDecoder = Any

try:
    VERSION = version("langchain-rapid")
except PackageNotFoundError:  # run from a source tree that was not installed
    VERSION = "0+unknown"

# LangChain's standard parameter of hosted models, which has no meaning here.
_HOSTED = ("max_retries",)


class Contexts(NamedTuple):
    """Prompts of both models.

    Attributes:
        target: the target's prompt.
        draft: the drafter's prompt; None if nothing was retrieved.
        found: arguments of the call that describe the retrieval.
    """

    target: str
    draft: str | None
    found: dict[str, Any]


class RapidModel(OptionFields):
    """Fields and generation of both classes.

    Models are loaded, and torch is imported, at the first generation.
    """

    # Errors do not show the given values, among which a token may be.
    model_config = ConfigDict(
        arbitrary_types_allowed=True, hide_input_in_errors=True, use_attribute_docstrings=True
    )

    decoder: RapidDecoder | None = Field(default=None, exclude=True, repr=False)
    """Loaded decoder, used instead of the options that load models."""
    preload: bool = Field(default=False, exclude=True, repr=False)
    """Whether to load the models when the object is made, not at its first call."""
    retriever: Runnable[str, list[Document]] | None = Field(default=None, exclude=True, repr=False)
    """Retriever of the drafter's context for the last human message; needs ``documents``."""
    documents: Annotated[Any, SkipValidation] = Field(default=None, exclude=True, repr=False)
    """Full texts for the target: a string, a mapping from document id to text, a list of Document,
    or a function from document id to text; needs ``retriever``, or in a ``ChatRapid`` an agent's
    tool that returns its documents."""
    document_id_key: str | None = None
    """Key of the chunks' metadata that holds the document's id; by default the first of
    ``document_id``, ``doc_id`` and ``source`` that names a document."""

    _reads_results_of_tools: ClassVar[bool] = False
    """Whether a tool may retrieve in the place of ``retriever``."""

    _loaded: LoadedDecoders = PrivateAttr(default_factory=LoadedDecoders)
    _sources: FullDocuments | None = PrivateAttr(default=None)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        with_field_help(cls)

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Pydantic's schema, of all fields that JSON can represent."""
        return super().model_json_schema(*args, **{"schema_generator": OptionsSchema, **kwargs})

    def model_post_init(self, context: Any, /) -> None:
        """Call LangChain's method, which pydantic's for private attributes would hide."""
        super().model_post_init(context)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        refuse_old_names(values, cls.model_fields)
        values = without_none(values)
        require_one_name(values)
        if values.get("base_url") is not None and values.get("decoder") is None:
            values = values | {"decoder": on_server(values)}
        values = hub.gathered({k: value for k, value in values.items() if k not in _HOSTED})
        return values if values.get("decoder") is None else values | names_of_decoder(values)

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        given, missing = ("retriever", "documents")[:: 1 if self.documents is None else -1]
        alone = (self.retriever is None) != (self.documents is None)
        if alone and not (given == "documents" and self._reads_results_of_tools):
            raise InvalidParameterError(
                f"{given}= was given without {missing}=: the retriever finds the drafter's "
                "context, the documents are the target's; pass both or neither"
            )
        hub.require_own(self.hub_options, options_of(EngineConfig))
        if self.documents is not None:
            self._sources = FullDocuments(self.documents, self.document_id_key)
        if self.preload:
            self.load()
        return self

    def __getstate__(self) -> dict[Any, Any]:
        """Pydantic's state without secrets; where it is restored, the environment has the token."""
        state = super().__getstate__()
        private = {
            name: without_secrets(getattr(self, name))
            for name, declared in OPTIONS.items()
            if declared.option.private
        }
        return state | {"__dict__": state["__dict__"] | private | {"api_key": None}}

    # --- one call ------------------------------------------------------------------------------

    def _call(self, stop: list[str] | None, arguments: Mapping[str, Any]) -> Call:
        """Merge the fields with the arguments of a call.

        Raises:
            InvalidParameterError: an unknown argument, or a value outside its range.
        """
        given = overrides(arguments)
        if stop is not None:
            given["stop"] = stop
        given.pop("stream", None)  # LangChain's argument; the called method implies it
        retrieved, places = given.pop("retrieved", None), given.pop("documents_at", [])
        confidence = given.pop("confidence", 1.0)
        fields = {name: getattr(self, name) for name in OPTIONS}
        return Call(*settings(fields, given), retrieved, places, confidence)

    def load(self) -> Self:
        """Load the models now instead of at the first call.

        Raises:
            ModelError: a model cannot be loaded.
        """
        self._decoder_for(self.model)
        return self

    def _decoder_for(self, model: str) -> RapidDecoder:
        """The decoder, loaded at the first use; objects with the same models share weights."""
        if self.decoder is not None and model == self.model:
            return self.decoder
        if self.base_url is not None and self.decoder is not None:
            raise not_the_model(model, self.decoder)
        config = replace(
            self._call(None, {"model": model}).engine,
            chat_template_kwargs={},  # each call passes all variables
            hub_options=hub.for_loading(self.hub_options, other_model=model != self.model),
            drafter_options=hub.for_loading(self.drafter_options),
        )
        return self._loaded.get(config)

    def _run(
        self,
        target: Written,
        draft: Written | None,
        call: Call,
        check: Callable[[], None] = lambda: None,
    ) -> Iterator[Delta]:
        """Generate an answer; ``check`` is called during the prefill and may stop it by raising."""
        decoder = self._decoder_for(call.engine.model)
        prompts = encoded(target, draft, decoder, call)
        answering = decoder.scheduler if AT_ONCE.get() else decoder
        for chunk in answering.stream(
            prompts.target,
            prompts.draft,
            sampling=call.sampling,
            speculation=call.speculation,
            confidence=call.confidence,
            progress=lambda *_: check(),
        ):
            chunk.stats.omitted_tokens = prompts.omitted_tokens
            yield chunk

    async def _arun(
        self, target: Written, draft: Written | None, call: Call
    ) -> AsyncIterator[Delta]:
        """:meth:`_run` in a thread, including loading; a cancellation takes effect in one round."""
        chunks = iterate_in_thread(lambda check: self._run(target, draft, call, check))
        async with aclosing(chunks):
            async for chunk in chunks:
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

    def _contexts(
        self, chunks: list[Document], question: str, arguments: Mapping[str, Any]
    ) -> Contexts:
        """Prompts of both models, from the retrieved chunks and the documents that they are from.

        Args:
            chunks: retrieved chunks.
            question: the question.
            arguments: arguments of the call; they override fields, and ``confidence`` among them
                overrides the chunks' scores.
        """
        from rapid_llm.context.prompts import INSTRUCTION, build_messages

        from langchain_rapid.grounding import find_sources

        assert self._sources is not None

        def message(texts: list[str]) -> str:
            if not texts:
                return f"{INSTRUCTION}\n\nQuestion: {question}"
            return build_messages(SEPARATOR.join(texts), question)[0]["content"]

        own = {"on_empty": self.on_empty, "order": self.order}
        given = own | overrides(arguments)
        asked = {name: given[name] for name in own}
        require(RetrievalConfig, **asked)
        sources = find_sources(chunks, self._sources, **asked)
        full = [source.document.page_content for source in sources.full]
        target = message(full)
        draft = [chunk.page_content for chunk in sources.chunks]
        places: list[Place] = places_of(sources.full, full, SEPARATOR, [target])
        return Contexts(
            target,
            message(draft) if draft else None,
            {
                "retrieved": sources.retrieved,
                "documents_at": places,
                "confidence": given.get("confidence", sources.confidence),
            },
        )

    # --- for LangChain's caches, traces and token counts ---------------------------------------

    @property
    def _identifying_params(self) -> dict[str, Any]:
        shown = {
            name: getattr(self, name)
            for name, declared in OPTIONS.items()
            if not declared.option.private
        }
        template = self.decoder.chat_template_kwargs if self.decoder is not None else {}
        return shown | {
            "base_url": self.base_url,
            "hub_options": hub.identifying(self.hub_options),
            "drafter_options": hub.identifying(self.drafter_options),
            # Repeated here, because in a cache key a call's arguments replace the values above,
            # and the meaning of None or of template variables depends on these.
            "defaults": {name: shown[name] for name in shown if OPTIONS[name].option.per_call}
            | {"chat_template_kwargs": {**template, **self.chat_template_kwargs}},
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
        given = by_field(call)
        params = LangSmithParams(
            ls_provider="rapid",
            ls_model_type=kind,
            ls_model_name=str(given.get("model", self.model)),
            ls_temperature=given.get("temperature", self.temperature),
            ls_max_tokens=given.get("max_tokens", self.max_tokens),
        )
        if stop := self.stop if stop is None else stop:
            params["ls_stop"] = list(stop)
        return params


def _retrieval_error(error: Exception) -> RetrievalError:
    return RetrievalError(
        f"the retriever failed with {type(error).__name__}: {error}; repair it, or ask without "
        "retriever="
    )
