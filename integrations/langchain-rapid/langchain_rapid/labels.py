"""Labels of whole documents, for a ``document_prompt``."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from langchain_core.documents import Document

from langchain_rapid.documents import Whole

_OF_A_PART = ("page", "page_label", "page_number", "row", "seq_num", "start_index")
"""Keys under which loaders and splitters say where in a document a chunk is."""


def label(key: str, name: str, whole: Whole, chunks: Sequence[Document]) -> Any:
    """The metadata of a whole document under one key.

    What its parts say: the value they share, or else all of their values (``0-9`` for the pages 0
    to 9). If they say nothing, what all chunks retrieved from it agree on, but for where in the
    document a chunk is. The document's id is its ``source`` if nothing else is. Else "", so that
    no label is claimed that is not known to be true of the whole document.
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
