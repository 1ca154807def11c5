"""Errors for options that have no effect on models that are given: loaded, or on a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rapid_llm.errors import InvalidParameterError
from rapid_llm.remote import RemoteDecoder

if TYPE_CHECKING:
    from rapid_llm.decoder import RapidDecoder


def not_the_model(asked: str, decoder: RapidDecoder | RemoteDecoder) -> InvalidParameterError:
    """The error for another model's name beside a decoder."""
    name = decoder.target.name
    if isinstance(decoder, RemoteDecoder):
        return InvalidParameterError(
            f"model={asked!r} is not served by base_url={decoder.base_url!r}, only {name!r}: leave "
            f"the model out, or give the address of a server that runs rapid-llm serve {asked}"
        )
    return InvalidParameterError(
        f"model={asked!r} and a loaded decoder of {name!r} were given: leave one of them out"
    )


def not_for_given(option: str, decoder: RapidDecoder | RemoteDecoder) -> InvalidParameterError:
    """The error for an option that belongs to the loading of models."""
    if isinstance(decoder, RemoteDecoder):
        return InvalidParameterError(
            f"{option} cannot be used with base_url={decoder.base_url!r}, where the models are "
            "loaded already: give it to rapid-llm serve"
        )
    return InvalidParameterError(
        f"{option} cannot be used for a loaded decoder: give it to RapidDecoder.from_pretrained"
    )
