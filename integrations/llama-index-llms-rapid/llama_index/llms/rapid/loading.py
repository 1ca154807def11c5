"""Load the models of a RapidLLM by name, or validate those of a given decoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llama_index.llms.rapid.counting import count_with
from llama_index.llms.rapid.fields import KNOWN
from rapid_llm.config import EngineConfig, RemoteConfig
from rapid_llm.given_models import not_for_given, not_the_model
from rapid_llm.options import options_of

if TYPE_CHECKING:
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.remote import RemoteDecoder


def of_models(engine: EngineConfig, *, own: bool) -> EngineConfig:
    """Options that loaded models depend on: all but the template's variables, which calls give.

    Args:
        engine: options of a call.
        own: whether they name the object's own model; ``hub_options`` of another ``model`` of a
            call are only those for access to a hub.
    """
    hub = dict(engine.hub_options)
    if hub and not own:
        from rapid_llm.models import HUB_ACCESS

        hub = {name: value for name, value in hub.items() if name in HUB_ACCESS}
    return replace(engine, chat_template_kwargs={}, hub_options=hub)


def load(engine: EngineConfig, *, own: bool) -> RapidDecoder:
    """Load the models of a config.

    Args:
        engine: the config.
        own: whether they are the object's own models, with whose tokenizer LlamaIndex is to count.

    Raises:
        ModelError: a model cannot be loaded.
    """
    from rapid_llm.decoder import RapidDecoder

    decoder = RapidDecoder.from_config(engine)
    if own:
        count_with(decoder.tokenizer)
    return decoder


def on_server(fields: Mapping[str, Any]) -> RemoteDecoder | None:
    """The models of the server that ``base_url`` names; None without one.

    Args:
        fields: of the constructor.

    Raises:
        InvalidParameterError: ``base_url`` is no URL.
    """
    config = RemoteConfig(**{name: fields.get(name) for name in options_of(RemoteConfig)})
    if config.base_url is None:
        return None
    from rapid_llm.remote import RemoteDecoder

    return RemoteDecoder(config.base_url, config.api_key)


def take_hub_access(arguments: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Remove arguments for access to a hub (``token``, ``revision``, …), and return them.

    Args:
        arguments: arguments of the constructor.
        known: names of other arguments.
    """
    names = arguments.keys() - set(known)
    if not names:
        return {}  # without an import of torch
    from rapid_llm.models import HUB_ACCESS

    return {name: arguments.pop(name) for name in names & HUB_ACCESS}


def require_loaded(decoder: RapidDecoder | RemoteDecoder, given: Mapping[str, Any]) -> None:
    """Refuse options that have no effect on a loaded decoder.

    Args:
        decoder: loaded models.
        given: validated options.

    Raises:
        InvalidParameterError: there is such an option, or the name of another model.
    """
    name = str(given.get("model", decoder.target.name))
    if name != decoder.target.name:
        raise not_the_model(name, decoder)
    for option, value in given.items():
        known = KNOWN.get(option)
        if known and not known.option.per_call and known.checked(value) != known.default:
            raise not_for_given(option, decoder)
