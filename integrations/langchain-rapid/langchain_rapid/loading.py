"""Take a given decoder, or the models of a server, in the place of the options that load models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rapid_llm.config import EngineConfig, RemoteConfig
from rapid_llm.errors import InvalidParameterError
from rapid_llm.given_models import not_for_given, not_the_model
from rapid_llm.options import options_of

if TYPE_CHECKING:
    from rapid_llm.remote import RemoteDecoder


def on_server(values: Mapping[str, Any]) -> RemoteDecoder:
    """The models of the server that ``base_url`` names.

    Args:
        values: fields of the object, ``base_url`` among them.

    Raises:
        InvalidParameterError: ``base_url`` is no URL.
    """
    from rapid_llm.remote import RemoteDecoder

    given = {name: values.get(name) for name in options_of(RemoteConfig)}
    config = RemoteConfig(**given)
    assert config.base_url is not None
    return RemoteDecoder(config.base_url, config.api_key)


def names_of_decoder(values: Mapping[str, Any]) -> dict[str, str]:
    """Names of a given decoder's models, for traces and cache keys.

    Args:
        values: fields of the object, ``decoder`` among them.

    Raises:
        InvalidParameterError: it is no decoder, or there are options that have no effect on one.
    """
    from rapid_llm.decoder import RapidDecoder  # imported already, because a decoder exists
    from rapid_llm.remote import RemoteDecoder

    decoder = values["decoder"]
    if not isinstance(decoder, RapidDecoder | RemoteDecoder):
        raise InvalidParameterError(
            f"decoder of type {type(decoder).__name__} is not allowed: pass a "
            "rapid_llm.RapidDecoder"
        )
    name, given = decoder.target.name, values.get("model")
    if given is not None and str(given) != name:
        raise not_the_model(str(given), decoder)
    for option, declared in options_of(EngineConfig).items():
        allowed = [declared.default]
        if option == "drafter":
            allowed.append(decoder.drafter.name)  # as in the fields of an existing object
        given = values.get(option, declared.default)
        if not declared.option.per_call and declared.checked(given) not in allowed:
            raise not_for_given(option, decoder)
    if decoder.drafter is decoder.target:
        return {"model": name}
    return {"model": name, "drafter": decoder.drafter.name}
