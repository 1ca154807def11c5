"""Lone surrogates: code points of a broken text that no encoding and no tokenizer takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for each surrogate, so that positions in it stay what they are."""
    return _SURROGATE.sub(_REPLACEMENT, text)


def nested_without_surrogates(value: Any) -> Any:
    """A value with :func:`without_surrogates` of every string in its mappings, lists and tuples."""
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, Mapping):
        return {
            nested_without_surrogates(key): nested_without_surrogates(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [nested_without_surrogates(item) for item in value]
    return value
