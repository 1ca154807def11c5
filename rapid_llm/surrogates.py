"""Replace lone surrogates, code points in broken strings that tokenizers and UTF-8 reject."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


def without_surrogates(text: str) -> str:
    """Replace each surrogate in a text by U+FFFD; character positions do not change."""
    return _SURROGATE.sub(_REPLACEMENT, text)


def nested_without_surrogates(value: Any) -> Any:
    """Apply :func:`without_surrogates` to all strings in nested mappings, lists and tuples."""
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
