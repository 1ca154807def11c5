"""One order for a set of documents, so that the same set makes the same prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias, TypeVar

from rapid_llm.config import Order, RetrievalConfig
from rapid_llm.options import require

LAST = "\U0010ffff"
"""Prefix of ids or titles that come after all others in canonical order: a noncharacter, which no
other id contains."""

_DIGITS = re.compile(r"([0-9]+)")

Name = TypeVar("Name", str, str | None)

_Key: TypeAlias = tuple[list[str | tuple[int, str]], str]


def in_order(
    names: Iterable[Name], order: Order, titles: Mapping[str, str] | None = None
) -> tuple[Name, ...]:
    """Ids of documents in the order in which the target reads them.

    Args:
        names: ids; None is the id of a single document without one.
        order: ``canonical`` compares digits in ids as numbers (``page-2`` before ``page-10``) and
            all else by code points; ``given`` keeps the order.
        titles: sort keys that are compared before the ids, by id, such as file names.

    Raises:
        InvalidParameterError: the order is unknown.
    """
    require(RetrievalConfig, order=order)
    if order == "given":
        return tuple(names)
    known = titles or {}

    def place(name: str | None) -> tuple[_Key, _Key]:
        own = name or ""
        return _natural(known.get(own, own)), _natural(own)

    return tuple(sorted(names, key=place))


def _natural(name: str) -> _Key:
    parts: list[str | tuple[int, str]] = []
    for i, part in enumerate(_DIGITS.split(name)):
        digits = part.lstrip("0")  # compared by their number first, as there may be very many
        parts.append((len(digits), digits) if i % 2 else part)
    return parts, name  # 2 and 02 differ
