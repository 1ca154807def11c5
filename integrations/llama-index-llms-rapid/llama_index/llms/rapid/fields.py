"""Options of rapid_llm as fields of a RapidLLM and as arguments of its calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_index.core.bridge.pydantic import create_model

from rapid_llm.config import (
    EngineConfig,
    RemoteConfig,
    RetrievalConfig,
    SamplingParams,
    SpeculationConfig,
)
from rapid_llm.options import by_name, options_of, pydantic_fields, sorted_into

_GROUPS = (SamplingParams, SpeculationConfig, EngineConfig, RetrievalConfig)

_LEFT_OUT = options_of(RetrievalConfig).keys() - {"truncate", "on_empty", "order"}
"""Options that the pipeline's own index and retriever decide."""

_FIELD_NAMES = {"max_new_tokens": "max_tokens"}
"""Names of fields in LlamaIndex that differ from rapid_llm's."""

KNOWN = {name: each for name, each in options_of(*_GROUPS).items() if name not in _LEFT_OUT}
"""The options by rapid_llm's names."""

WORDS = frozenset(KNOWN) | {word for each in KNOWN.values() for word in each.option.aliases}
"""All names and aliases of the options."""

# Any: mypy knows no base class that is made at run time.
OptionFields: Any = create_model(
    "OptionFields",
    __module__=__name__,
    **pydantic_fields(*_GROUPS, leave_out=_LEFT_OUT, names=_FIELD_NAMES),
    **pydantic_fields(RemoteConfig),
)
"""The options as fields of a pydantic model."""


@dataclass(frozen=True)
class Options:
    """Options of one call.

    Attributes:
        sampling: sampling options.
        speculation: speculation options.
        engine: engine options; ``chat_template_kwargs`` are the object's and the call's.
        retrieval: retrieval options ``truncate``, ``on_empty`` and ``order``.
    """

    sampling: SamplingParams
    speculation: SpeculationConfig
    engine: EngineConfig
    retrieval: RetrievalConfig


def as_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Validate options and return them by the names of :data:`OptionFields`.

    Raises:
        InvalidParameterError: an unknown name, an option given twice, or a value outside its range.
    """
    given = by_name(options, KNOWN)
    sorted_into(given, *_GROUPS)
    if given.get("chat_template_kwargs"):
        given["chat_template_kwargs"] = _variables(given["chat_template_kwargs"])
    return {_FIELD_NAMES.get(name, name): value for name, value in given.items()}


def options_of_call(fields: object, call: Mapping[str, Any]) -> Options:
    """Options of an object with :data:`OptionFields`, overridden by those of a call.

    Args:
        fields: the object.
        call: options of the call by name. None leaves the object's value, except where None is a
            value (``seed``, ``repetition_penalty``, ``timeout``, ``truncate``).

    Raises:
        InvalidParameterError: as :func:`as_fields`; or an option belongs to loaded models.
    """
    merged = {name: getattr(fields, _FIELD_NAMES.get(name, name)) for name in KNOWN}
    variables = _variables(merged["chat_template_kwargs"])
    given = by_name(call, {n: each for n, each in KNOWN.items() if each.option.per_call})
    variables |= _variables(given.pop("chat_template_kwargs", None))
    return Options(*sorted_into({**merged, **given, "chat_template_kwargs": variables}, *_GROUPS))


def _variables(given: Any) -> dict[str, Any]:
    if given is None or given == {}:
        return {}
    from rapid_llm.chat import checked_variables

    return checked_variables(given)
