"""Join Documents that are pages or sections of one file to full texts, found by id or metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from llama_index.core.schema import BaseNode, Document

from llama_index.llms.rapid.fulltext import FullText
from rapid_llm.errors import InvalidParameterError

DocumentKey: TypeAlias = str | Callable[[BaseNode], object]
"""Metadata key, or function of a Document, with equal values for the parts of one document."""

_PAGE_KEYS = ("page_label", "page_number", "page")


class Catalog:
    """Full texts joined from Documents, with lookups by id, key and metadata.

    Args:
        entries: ids and Documents or texts.
        document_key: metadata key or function that joins Documents; None joins those of one file.

    Attributes:
        texts: full texts, in the order of their first parts.
        ids: full texts by the id of any part.
        keyed: full texts by the value of ``document_key``.
    """

    def __init__(
        self, entries: Iterable[tuple[str, str | BaseNode]], document_key: DocumentKey | None
    ) -> None:
        groups: dict[tuple[str, str], list[tuple[str, str | BaseNode]]] = {}
        of: dict[str, tuple[str, str]] = {}
        for name, part in entries:
            group = group_of(part, document_key) or ("id", name)
            if name in of and (group != of[name] or group[0] == "id"):
                raise InvalidParameterError(
                    f"two Documents have the id {name!r}: give each its own (id_=...), or join "
                    "them; only the parts of one file may share an id"
                )
            of[name] = group
            groups.setdefault(group, []).append((name, part))
        self.keyed: dict[str, FullText] = {}
        self.ids: dict[str, FullText] = {}
        named: dict[str, FullText] = {}
        for (kind, value), members in groups.items():
            if kind == "file_name":
                _require_one_file(value, [part for _, part in members])
            joined = kind == "key" or len(members) > 1
            called = value if joined else members[0][0]
            if called in named:
                raise InvalidParameterError(
                    f"{called!r} is the id of a Document and the {kind} of others: give each "
                    "document an id of its own"
                )
            text = named[called] = FullText(called, _in_order([part for _, part in members]))
            for name, part in members:
                self.ids[name] = text
                if isinstance(part, BaseNode):
                    self.ids.setdefault(part.node_id, text)
            if kind == "key":
                self.keyed[value] = text
        self.texts = list(named.values())
        if isinstance(document_key, str):
            self._require_key(document_key)

    def having(self, key: str) -> dict[str, list[FullText]]:
        """Full texts by their values of a metadata key."""
        values: dict[str, list[FullText]] = {}
        for text in self.texts:
            found = {
                str(part.metadata[key])
                for part in text.parts
                if isinstance(part, BaseNode) and key in part.metadata
            }
            for value in found:
                values.setdefault(value, []).append(text)
        return values

    def _require_key(self, key: str) -> None:
        parts = [p for text in self.texts for p in text.parts if isinstance(p, BaseNode)]
        if parts and not self.keyed:
            known = sorted({name for part in parts for name in part.metadata})
            raise InvalidParameterError(
                f"document_key={key!r} is in no document's metadata, which have "
                + (", ".join(map(repr, known)) or "no keys")
            )


def group_of(part: str | BaseNode, document_key: DocumentKey | None) -> tuple[str, str] | None:
    """Kind and value that the parts of one document share; None for a document of one part."""
    if not isinstance(part, BaseNode):
        return None
    if document_key is not None:
        value = key_value(part, document_key)
        return None if value is None else ("key", str(value))
    if not isinstance(part, Document):
        return None
    if part.metadata.get("file_path") is not None:
        return "file_path", str(part.metadata["file_path"])
    if part.metadata.get("file_name") is not None and "page_label" in part.metadata:
        return "file_name", str(part.metadata["file_name"])
    return None


def key_value(node: BaseNode, document_key: DocumentKey) -> object:
    """Value of a document key for a node."""
    return node.metadata.get(document_key) if isinstance(document_key, str) else document_key(node)


def _require_one_file(name: str, parts: Sequence[str | BaseNode]) -> None:
    """Refuse pages that may be from two files of the same name in different folders."""
    labels = Counter(p.metadata["page_label"] for p in parts if isinstance(p, BaseNode))
    twice = [label for label, count in labels.items() if count > 1]
    if twice:
        raise InvalidParameterError(
            f"page_label={twice[0]!r} of file_name={name!r} is there twice, so two files may have "
            "that name: say with document_key=... which Documents are one, by a metadata key (such "
            "as a file_path that you add), or by a function"
        )


def _in_order(parts: Sequence[str | BaseNode]) -> tuple[str | BaseNode, ...]:
    for key in _PAGE_KEYS:
        pages = [str(p.metadata.get(key)) if isinstance(p, BaseNode) else "" for p in parts]
        if all(page.isdecimal() for page in pages) and len(set(map(int, pages))) == len(parts):
            numbered = sorted(zip(map(int, pages), parts, strict=True), key=lambda pair: pair[0])
            return tuple(part for _, part in numbered)
    return tuple(parts)
