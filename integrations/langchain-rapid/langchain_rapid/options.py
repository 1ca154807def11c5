"""Options of rapid-llm as fields of a LangChain model and as arguments of its calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from pydantic import create_model
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import CoreSchema, PydanticOmit
from rapid_llm.config import (
    EngineConfig,
    RemoteConfig,
    RetrievalConfig,
    SamplingParams,
    SpeculationConfig,
)
from rapid_llm.errors import InvalidParameterError
from rapid_llm.options import Declared, options_of, pydantic_fields, sorted_into
from rapid_llm.tools.definitions import ChatOptions

_GROUPS = (SamplingParams, SpeculationConfig, EngineConfig, RetrievalConfig)

# LangChain's retriever makes and ranks chunks.
_LEFT_OUT = options_of(RetrievalConfig).keys() - {"truncate", "on_empty", "order"}

_NAMES = {"max_new_tokens": "max_tokens"}
"""LangChain's standard names for options."""

OPTIONS: Mapping[str, Declared] = {
    _NAMES.get(name, name): declared
    for name, declared in options_of(*_GROUPS).items()
    if name not in _LEFT_OUT
}
"""Every option by its field's name."""

_FIELDS = {
    word: field
    for field, declared in OPTIONS.items()
    if declared.option.per_call
    for word in (field, declared.name, *declared.option.aliases)
}
"""Fields by the names that a call may use for them."""

if TYPE_CHECKING:
    from pydantic import BaseModel

    from langchain_rapid.places import Place

    class OptionFields(BaseModel):
        """The class for type checkers: options of any name and type."""

        def __getattr__(self, name: str) -> Any: ...

else:
    OptionFields = create_model(
        "OptionFields",
        **pydantic_fields(*_GROUPS, leave_out=_LEFT_OUT, defaults={"seed": None}, names=_NAMES),
        **pydantic_fields(RemoteConfig),
    )

Settings: TypeAlias = tuple[SamplingParams, SpeculationConfig, EngineConfig, RetrievalConfig]


def without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a constructor without those that are None where None is not a value."""
    words = {
        word: declared
        for field, declared in OPTIONS.items()
        for word in (field, declared.name, *declared.option.aliases)
    }
    return {
        name: value
        for name, value in fields.items()
        if value is not None or name not in words or words[name].optional
    }


def require_one_name(fields: Mapping[str, Any]) -> None:
    """Raise InvalidParameterError where a field is given by two of its names."""
    for declared in OPTIONS.values():
        if len(names := fields.keys() & {declared.name, *declared.option.aliases}) > 1:
            raise InvalidParameterError(
                f"{' and '.join(sorted(names))} are one option; give one of them"
            )


def overrides(call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call without those that are None.

    None is kept where it is a value but not the default: ``seed=None`` is a random seed.
    """

    def is_given(word: str, value: Any) -> bool:
        if value is not None or word not in _FIELDS:
            return value is not None
        declared = OPTIONS[_FIELDS[word]]
        return declared.optional and declared.default is not None

    return {word: value for word, value in call.items() if is_given(word, value)}


def by_field(call: Mapping[str, Any]) -> dict[str, Any]:
    """Options among the arguments of a call, by field name, not validated."""
    return {_FIELDS[w]: value for w, value in overrides(call).items() if w in _FIELDS}


def settings(fields: Mapping[str, Any], call: Mapping[str, Any]) -> Settings:
    """Options of one generation, in which a call's arguments override a model's fields.

    Variables of the chat template are merged, name by name.

    Args:
        fields: values of the model's fields.
        call: arguments of the call.

    Raises:
        InvalidParameterError: an argument that no call takes, or a value outside its range.
    """
    given = overrides(call)
    if unknown := sorted(given.keys() - _FIELDS.keys()):
        only = " but when the model is constructed" if unknown[0] in OPTIONS else ""
        raise InvalidParameterError(
            f"{unknown[0]}= is not taken{only}; a call takes {', '.join(sorted(_FIELDS))}"
        )
    named = {_FIELDS[word] for word in given}
    flat = {each.name: fields[field] for field, each in OPTIONS.items() if field not in named}
    sampling, speculation, engine, retrieval = sorted_into(flat | given, *_GROUPS)
    variables = {**fields["chat_template_kwargs"], **engine.chat_template_kwargs}
    return sampling, speculation, replace(engine, chat_template_kwargs=variables), retrieval


class Call(NamedTuple):
    """The options and the retrieval of one generation.

    Attributes:
        sampling, speculation, engine, retrieval: options.
        retrieved: known ids and positions of each retrieved chunk; None without a retrieval.
        places: positions of documents in the target's prompt.
        confidence: confidence of the retrieval, in [0, 1].
        formatted: whether control tokens of a text prompt steer the model.
        chat: tools and response format.
    """

    sampling: SamplingParams
    speculation: SpeculationConfig
    engine: EngineConfig
    retrieval: RetrievalConfig
    retrieved: list[dict[str, Any]] | None
    places: list[Place]
    confidence: float
    formatted: bool = False
    chat: ChatOptions = ChatOptions()


class OptionsSchema(GenerateJsonSchema):
    """JSON schema without fields that JSON cannot represent: LangChain's functions and objects."""

    def handle_invalid_for_json_schema(self, schema: CoreSchema, error_info: str) -> Any:
        """Leave the field out."""
        raise PydanticOmit
