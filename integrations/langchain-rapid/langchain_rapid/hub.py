"""Arguments of ``from_pretrained`` that reach a hub: revision, token, cache folder, …"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import SecretStr
from rapid_llm.errors import InvalidParameterError

SHORT = ("token", "revision", "cache_dir")
"""Names that constructors take directly, like those of other LangChain models."""

# Options of access to a model, which do not identify it. Some of these are secrets.
_FETCHING = (
    "token",
    "use_auth_token",
    "proxies",
    "cache_dir",
    "local_files_only",
    "force_download",
)


def gathered(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a constructor, with those of :data:`SHORT` moved into ``hub_options``."""
    short = {name: values[name] for name in SHORT if values.get(name) is not None}
    rest = {name: value for name, value in values.items() if name not in SHORT}
    given = rest.get("hub_options") or {}
    if not short or not isinstance(given, Mapping):
        return rest
    return rest | {"hub_options": {**given, **short}}


def require_own(options: Mapping[str, Any], fields: Iterable[str]) -> None:
    """Raise InvalidParameterError for an option that has a field of its own."""
    if taken := options.keys() & set(fields):
        name = min(taken)
        raise InvalidParameterError(
            f"hub_options holds {name!r}: give it as {name}= instead, a field of its own"
        )


def for_loading(options: Mapping[str, Any], *, other_model: bool = False) -> dict[str, Any]:
    """Hub options as arguments of ``from_pretrained``, with secrets revealed.

    Args:
        options: the hub options.
        other_model: whether a call named another model, to which ``revision`` does not apply.
    """
    plain = {name: _revealed(value) for name, value in options.items()}
    if other_model:
        plain.pop("revision", None)
    return plain


def identifying(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that identify a model, for traces and cache keys, without secrets."""
    return {
        name: identifying(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
        if name not in _FETCHING
    }


def _revealed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _revealed(inner) for name, inner in value.items()}
    return value.get_secret_value() if isinstance(value, SecretStr) else value
