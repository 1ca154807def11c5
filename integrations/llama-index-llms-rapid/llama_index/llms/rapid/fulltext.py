"""The full text of a document for the target, joined from its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode

from rapid_llm.context.retrieved import SEPARATOR
from rapid_llm.errors import DocumentError


@dataclass(frozen=True)
class FullText:
    """One document for the target: one text, or the parts of one file in order.

    Attributes:
        name: id of the Document, or the value that its parts share (the file's path).
        parts: texts or Documents. Documents are read like nodes in LlamaIndex's prompts: with their
            metadata, except for ``excluded_llm_metadata_keys``.

    Raises:
        DocumentError: a part is neither text nor a Document.
    """

    name: str
    parts: tuple[str | BaseNode, ...]

    def __post_init__(self) -> None:
        for part in self.parts:
            if not isinstance(part, str | BaseNode):
                raise DocumentError(
                    f"document {self.name!r} is {type(part).__name__}, not text: give its text, or "
                    "a Document"
                )

    @property
    def file(self) -> str | None:
        """Path, or else name, of the document's file in its metadata; None if there is none."""
        first = self.parts[0] if self.parts else None
        if not isinstance(first, BaseNode):
            return None
        file = first.metadata.get("file_path") or first.metadata.get("file_name")
        return None if file is None else str(file)

    @property
    def shown(self) -> str:
        """Text for the target: the parts that are not blank, joined by blank lines."""
        return SEPARATOR.join(
            _content(part, MetadataMode.LLM)
            for part in self.parts
            if _content(part, MetadataMode.NONE).strip()
        )

    @cached_property
    def body(self) -> str:
        """Text without metadata and with single blanks as white space, to search for passages."""
        return " ".join(" ".join(_content(p, MetadataMode.NONE).split()) for p in self.parts)

    @cached_property
    def bodies(self) -> frozenset[str]:
        """:attr:`body` of each part."""
        return frozenset(" ".join(_content(p, MetadataMode.NONE).split()) for p in self.parts)

    @cached_property
    def heads(self) -> frozenset[str]:
        """Lines of metadata that are shown with its text, with single blanks as white space."""
        return frozenset().union(*map(lines_around, self.parts))

    @cached_property
    def keys(self) -> frozenset[str]:
        """Metadata keys of its parts."""
        return frozenset(
            key for part in self.parts if isinstance(part, BaseNode) for key in part.metadata
        )

    def denies(self, line: str) -> bool:
        """Whether a line before a passage is metadata of another document."""
        key, colon, _ = line.partition(":")
        return bool(colon) and key in self.keys and line not in self.heads

    def differs(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a node's metadata contradict those of every part."""
        return all(
            isinstance(part, BaseNode)
            and any(metadata.get(key, value) != value for key, value in part.metadata.items())
            for part in self.parts
        )

    def holds(self, passage: str) -> bool:
        """Whether it contains a passage without metadata, ignoring white space."""
        return " ".join(passage.split()) in self.body


def telling(passage: str, document: FullText) -> bool:
    """Whether a passage is long enough to identify its document.

    A document may contain a few words by chance, so they do not identify it, unless they are a
    whole part of it.

    Args:
        passage: passage with single blanks as white space.
        document: document that contains the passage.
    """
    return len(passage.encode(errors="replace")) >= 24 or passage in document.bodies


def lines_around(part: str | BaseNode) -> frozenset[str]:
    """Lines that are shown with a part's text, such as metadata."""
    return lines_of(
        _content(part, MetadataMode.LLM).replace(_content(part, MetadataMode.NONE), "", 1)
    )


def lines_of(text: str) -> frozenset[str]:
    """Lines of a text that are not blank, with single blanks as white space."""
    return frozenset(" ".join(line.split()) for line in text.splitlines() if line.strip())


def _content(part: str | BaseNode, mode: MetadataMode) -> str:
    return part if isinstance(part, str) else part.get_content(metadata_mode=mode)
