"""OpenAI's requests, with documents, chunks and the options of this library.

A field that is not declared here is refused by its name. null is the same as no field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from rapid_llm.config import EngineConfig, RetrievalConfig, SamplingParams, SpeculationConfig
from rapid_llm.options import options_of, pydantic_fields
from rapid_llm.server.errors import FieldError
from rapid_llm.stats import Method

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles of messages; a chat template would write any other word as it is."""

_SERVERS_OWN = ("embedder", "store")
"""Retrieval options that name models and folders of the server."""

_LENGTH = "max_new_tokens"
_LENGTHS = ("max_completion_tokens", "max_tokens", _LENGTH)
"""Names of the maximum length of an answer."""

_NEUTRAL: dict[str, tuple[Any, str]] = {
    "n": (1, "send the request n times"),
    "best_of": (1, "send the request several times"),
    "frequency_penalty": (0, "repetition_penalty penalizes tokens seen before"),
    "presence_penalty": (0, "repetition_penalty penalizes tokens seen before"),
    "logit_bias": ({}, "constraint limits what an answer may hold"),
    "echo": (False, "join prompt and answer yourself"),
    "suffix": ("", "this model only continues a text"),
    "store": (False, "answers are not kept"),
}
"""OpenAI's fields that only one value of is served, and what to do instead."""


class Strict(BaseModel):
    """A part of a request: unknown fields are refused, null is no field."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {name: value for name, value in values.items() if value is not None}


class TextDocument(Strict):
    """A document by its text."""

    text: str
    title: str | None = None
    id: str | None = None


class DataDocument(Strict):
    """A document in Cohere's form."""

    data: str | dict[str, Any]
    id: str | None = None


class FileDocument(Strict):
    """A document that was uploaded."""

    file_id: str
    title: str | None = None
    id: str | None = None


class TextChunk(TextDocument):
    """A passage that the caller's retriever found, best first."""

    document_id: str | None = None


class DataChunk(DataDocument):
    """A passage in Cohere's form."""

    document_id: str | None = None


_DOCUMENTS: dict[str, type[Strict]] = {
    "text": TextDocument,
    "data": DataDocument,
    "file_id": FileDocument,
}
_CHUNKS: dict[str, type[Strict]] = {"text": TextChunk, "data": DataChunk}


def _formed(values: Any, forms: Mapping[str, type[Strict]], what: str) -> list[Any] | None:
    """Validate each of several by the form whose field it has; a string is a text."""
    if values is None:
        return None
    if not isinstance(values, list):
        raise ValueError(f"{what}s must be a list, not {type(values).__name__}")
    made = []
    for number, value in enumerate(values):
        value = {"text": value} if isinstance(value, str) else value
        form = next((f for n, f in forms.items() if isinstance(value, dict) and n in value), None)
        if form is None:
            raise ValueError(
                f"{what}s[{number}] is not allowed: a {what} is a string, or an object with one of "
                f"{', '.join(forms)}"
            )
        try:
            made.append(form.model_validate(value))
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            field = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                known = ", ".join(form.model_fields)
                reason = f"unknown field {field!r}; known are {known}"
            else:
                reason = f"{field}: {first['msg']}"
            raise ValueError(f"{what}s[{number}]: {reason}") from None
    return made


_documents = partial(_formed, forms=_DOCUMENTS, what="document")
_chunks = partial(_formed, forms=_CHUNKS, what="chunk")


class Documents(Strict):
    """Fields of a request about its documents."""

    documents: Annotated[
        Any, BeforeValidator(partial(_formed, forms=_DOCUMENTS, what="document"))
    ] = None
    chunks: Annotated[Any, BeforeValidator(partial(_formed, forms=_CHUNKS, what="chunk"))] = None


class _RapidFields(Strict):
    """Options of this library: speculation, retrieval, and what goes to the drafter.

    Attributes:
        method: ``rapid``, ``sd``, ``lc`` or ``rag``.
        confidence: confidence of the caller's retrieval, in [0, 1]; for ``dynamic_eta``.
        draft_messages: chat messages of the draft prompt, in the place of what is retrieved.
        draft_prompt: text or token ids of the draft prompt of a completion.
        return_tokens: whether the answer, and each part of a stream, tells its tokens in
            ``rapid.tokens``: id, text and where each came from.
    """

    method: Method = "rapid"
    confidence: Annotated[float, Field(ge=0, le=1)] = 1.0
    draft_messages: list[dict[str, Any]] | None = None
    draft_prompt: str | list[int] | None = None
    return_tokens: bool = False


RapidOptions: Any = create_model(
    "RapidOptions",
    __base__=_RapidFields,
    **pydantic_fields(SpeculationConfig, RetrievalConfig, leave_out=_SERVERS_OWN),
)

_length = options_of(SamplingParams)[_LENGTH]
_lengths: dict[str, Any] = {
    name: (
        Annotated[Any, BeforeValidator(replace(_length, name=name).checked)],  # errors name it so
        Field(_length.default, description=_length.option.help),
    )
    for name in _LENGTHS
}
_Sampling: Any = create_model(
    "_Sampling",
    __base__=Strict,
    **pydantic_fields(SamplingParams, leave_out=(_LENGTH,)),
    **_lengths,
)
_Template: Any = create_model(
    "_Template",
    __base__=Strict,
    **pydantic_fields(
        EngineConfig,
        leave_out=[n for n in options_of(EngineConfig) if n != "chat_template_kwargs"],
    ),
)


class StreamOptions(Strict):
    """Parts of a stream beside the answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Request(Documents, _Sampling, _Template):
    """Fields of both kinds of requests."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    rapid: RapidOptions = Field(default_factory=RapidOptions)
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    n: Any = 1
    frequency_penalty: Any = 0
    presence_penalty: Any = 0
    logit_bias: Any = None
    store: Any = False

    @model_validator(mode="after")
    def _one_length(self) -> Request:
        given = {n: getattr(self, n) for n in _LENGTHS if n in self.model_fields_set}
        if len(set(given.values())) > 1:
            raise FieldError(
                next(iter(given)), f"{' and '.join(given)} are one option: give one of them"
            )
        for value in given.values():
            setattr(self, _LENGTH, value)
        return self

    @model_validator(mode="after")
    def _served(self) -> Request:
        for name in self.model_fields_set & _NEUTRAL.keys():
            only, instead = _NEUTRAL[name]
            if (value := getattr(self, name)) != only or isinstance(value, bool) != isinstance(
                only, bool
            ):
                raise FieldError(
                    name, f"{name}={value!r} is not supported, only {only!r}: {instead}"
                )
        if self.stream_options is not None and not self.stream:
            raise FieldError(
                "stream_options",
                "stream_options is for streams: leave it out, or pass stream=true",
            )
        if self.chunks is not None and self.documents is None:
            raise FieldError(
                "chunks",
                "chunks were given without documents: pass the documents that they are from, which "
                "the target reads",
            )
        own_draft = self.rapid.draft_messages is not None or self.rapid.draft_prompt is not None
        if self.rapid.method in ("rag", "sd") and self.documents is None and not own_draft:
            raise FieldError(
                "rapid.method",
                f"method={self.rapid.method!r} needs documents, or a draft of rapid: pass one of "
                "them",
            )
        if own_draft and self.chunks is not None:
            raise FieldError(
                "chunks",
                "chunks and a draft of rapid were given, which both are the drafter's context: "
                "leave one of them out",
            )
        return self

    question: ClassVar[str]
    """Field that is asked: ``messages`` or ``prompt``."""

    @property
    def scored(self) -> int | None:
        """Number of likely tokens to tell at each place; None for no probabilities."""
        raise NotImplementedError

    def options(self, group: type) -> dict[str, Any]:
        """Options of a dataclass that the request gives, by name."""
        part = self.rapid if group in (SpeculationConfig, RetrievalConfig) else self
        return {n: getattr(part, n) for n in options_of(group) if n in part.model_fields_set}


class ChatRequest(Request):
    """Body of ``/v1/chat/completions``."""

    question = "messages"

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _chat(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise FieldError(
                "top_logprobs", f"top_logprobs={self.top_logprobs} needs logprobs=true"
            )
        if self.rapid.draft_prompt is not None:
            raise FieldError(
                "rapid.draft_prompt",
                "rapid.draft_prompt is for completions: pass rapid.draft_messages",
            )
        _require_roles("messages", self.messages)
        _require_roles("rapid.draft_messages", self.rapid.draft_messages or [])
        return self

    @property
    def scored(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


def _require_roles(field: str, messages: list[dict[str, Any]]) -> None:
    for number, message in enumerate(messages):
        role = message.get("role")
        if isinstance(role, str) and role not in ROLES:  # without one it is refused later
            name = f"{field}.{number}.role"
            raise FieldError(
                name, f"{name}={role!r} is not allowed: take one of {', '.join(ROLES)}"
            )


class CompletionRequest(Request):
    """Body of ``/v1/completions``."""

    question = "prompt"

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Any = 1
    echo: Any = False
    suffix: Any = ""

    @model_validator(mode="after")
    def _completion(self) -> CompletionRequest:
        if self.rapid.draft_messages is not None:
            raise FieldError(
                "rapid.draft_messages",
                "rapid.draft_messages are for chats: pass rapid.draft_prompt",
            )
        prompt = self.one_prompt
        if self.documents is not None and not isinstance(prompt, str):
            raise FieldError(
                "documents",
                "documents were given with token ids: pass the question as text, or the prompt "
                "with the documents in it",
            )
        return self

    @property
    def scored(self) -> int | None:
        return self.logprobs

    @property
    def one_prompt(self) -> str | list[int]:
        """The prompt; several are refused."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise FieldError(
                    "prompt", f"{len(prompt)} prompts were given: send a request for each of them"
                )
            prompt = prompt[0]
        if not prompt:
            raise FieldError("prompt", "the prompt is empty: pass at least one character or token")
        return prompt
