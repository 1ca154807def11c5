"""Full text of a document, as the target reads it."""

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
    """One document as the target reads it: one text, or the parts of one file in their order.

    Attributes:
        name: the Document's id, or what its parts have in common (the file's path).
        parts: texts, or Documents, which are read as the pipeline shows its nodes to an LLM: with
            their metadata, except for ``excluded_llm_metadata_keys``.

    Raises:
        DocumentError: a part is neither.
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
        """The path, or else the name, of the file that it is from; None if it does not say."""
        first = self.parts[0] if self.parts else None
        if not isinstance(first, BaseNode):
            return None
        file = first.metadata.get("file_path") or first.metadata.get("file_name")
        return None if file is None else str(file)

    @property
    def shown(self) -> str:
        """What the target reads: the parts but for blank ones, joined by blank lines."""
        return SEPARATOR.join(
            _content(part, MetadataMode.LLM)
            for part in self.parts
            if _content(part, MetadataMode.NONE).strip()
        )

    @cached_property
    def body(self) -> str:
        """The text without metadata, every white space a single blank: passages are found in it."""
        return " ".join(" ".join(_content(p, MetadataMode.NONE).split()) for p in self.parts)

    @cached_property
    def bodies(self) -> frozenset[str]:
        """As ``body``, of each part alone."""
        return frozenset(" ".join(_content(p, MetadataMode.NONE).split()) for p in self.parts)

    @cached_property
    def heads(self) -> frozenset[str]:
        """The lines that are shown beside its text, every white space a single blank."""
        return frozenset().union(*map(lines_around, self.parts))

    @cached_property
    def keys(self) -> frozenset[str]:
        """The metadata keys of its parts."""
        return frozenset(
            key for part in self.parts if isinstance(part, BaseNode) for key in part.metadata
        )

    def denies(self, line: str) -> bool:
        """Whether a line before a passage is metadata of another document than this one."""
        key, colon, _ = line.partition(":")
        return bool(colon) and key in self.keys and line not in self.heads

    def differs(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a node's metadata are those of no part, but for keys that only one has."""
        return all(
            isinstance(part, BaseNode)
            and any(metadata.get(key, value) != value for key, value in part.metadata.items())
            for part in self.parts
        )

    def holds(self, passage: str) -> bool:
        """Whether a passage without metadata was cut out of it; white space does not matter."""
        return " ".join(passage.split()) in self.body


def telling(passage: str, document: FullText) -> bool:
    """Whether a passage is long enough to tell that it is from this document.

    A few words may stand in a document by chance; they do not open it to the target, unless they
    are all that there is in it.

    Args:
        passage: every white space in it a single blank.
        document: holds the passage.
    """
    return len(passage.encode(errors="replace")) >= 24 or passage in document.bodies


def lines_around(part: str | BaseNode) -> frozenset[str]:
    """The lines that are shown beside its text, such as metadata."""
    return lines_of(
        _content(part, MetadataMode.LLM).replace(_content(part, MetadataMode.NONE), "", 1)
    )


def lines_of(text: str) -> frozenset[str]:
    """The lines of a text, every white space a single blank, but for blank ones."""
    return frozenset(" ".join(line.split()) for line in text.splitlines() if line.strip())


def _content(part: str | BaseNode, mode: MetadataMode) -> str:
    return part if isinstance(part, str) else part.get_content(metadata_mode=mode)
