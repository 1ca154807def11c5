"""Metadata of whole documents, for the variables of a ``document_prompt``."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from langchain_core.documents import Document

from langchain_rapid.documents import Whole

_OF_A_PART = ("page", "page_label", "page_number", "row", "seq_num", "start_index")
"""Keys under which loaders and splitters store a chunk's position in its document."""


def label(key: str, name: str, whole: Whole, chunks: Sequence[Document]) -> Any:
    """Metadata of a whole document under one key, if it is known for all of the document.

    This is the value that all parts share, or else their values joined (``0-9`` for pages 0 to 9).
    If the parts have none, it is the value that all retrieved chunks share, unless the key is a
    position. Otherwise it is the document's id for ``source``, and "" for other keys.

    Args:
        key: key of the metadata.
        name: id of the document.
        whole: the document.
        chunks: chunks retrieved from it.
    """
    said = [part.metadata[key] for part in whole.parts if part.metadata.get(key) is not None]
    if said:
        return said[0] if all(value == said[0] for value in said) else _span(said)
    if key not in _OF_A_PART:
        said = [chunk.metadata.get(key) for chunk in chunks]
        if said and said[0] is not None and all(value == said[0] for value in said):
            return said[0]
    return name if key == "source" else ""


def _span(values: Sequence[Any]) -> str:
    if all(isinstance(value, Real) for value in values):
        return f"{min(values)}-{max(values)}"
    return ", ".join(dict.fromkeys(map(str, values)))
