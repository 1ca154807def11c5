"""LlamaIndex's nodes and documents as the passages and full texts of ``rapid_llm``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from llama_index.core.schema import BaseNode, Document, MetadataMode, NodeWithScore
from llama_index.core.storage.docstore import BaseDocumentStore

from rapid_llm.context.retrieved import Documents, Grounding, Passage, ground
from rapid_llm.errors import DocumentError, InvalidParameterError

DocumentSource: TypeAlias = (
    str
    | BaseNode
    | Sequence[BaseNode]
    | Mapping[str, str | BaseNode]
    | BaseDocumentStore
    | Callable[[str], str | BaseNode | None]
)
"""Where the full texts are: one text or document, several documents, a mapping from their ids, a
docstore that holds them, or a function."""


def as_documents(source: DocumentSource) -> Documents:
    """The source in the form of ``rapid_llm``: a text, a mapping or a function of the id.

    Documents are read as the pipeline shows its nodes to an LLM: with their metadata, except for
    ``excluded_llm_metadata_keys``.

    Raises:
        InvalidParameterError: the source is of another type.
    """
    if isinstance(source, str):
        return source
    if isinstance(source, BaseNode):
        source = [source]
    if isinstance(source, BaseDocumentStore):
        store = source
        return lambda name: _from_docstore(store, name)
    if isinstance(source, Mapping):
        return _Texts(source)
    if isinstance(source, Sequence):
        listed = {item.node_id: item for item in source if isinstance(item, BaseNode)}
        if len(listed) == len(source):
            return _Texts(listed)
    if callable(source):
        function = source
        return lambda name: _text(function(name))
    raise InvalidParameterError(
        f"documents of type {type(source).__name__} are not allowed: give one text, a list of "
        "Documents, a mapping from ids to texts or Documents, a docstore, or a function"
    )


def ground_nodes(nodes: Sequence[NodeWithScore], documents: Documents) -> Grounding:
    """The two contexts of a question: what the nodes show, and the documents that they are from.

    A node that is no chunk of anything is looked up by its own id; one that is a ``Document``
    counts as the whole document if it is not found.

    Raises:
        DocumentError: see :func:`rapid_llm.context.retrieved.ground`.
    """
    whole: dict[str, str] = {}
    passages = []
    for scored in nodes:
        node = scored.node
        source = node.ref_doc_id
        if source is None and not isinstance(documents, str):
            text = _find(documents, node.node_id)
            if text is None and isinstance(node, Document):
                text = _text(node)
            if text is not None:
                source, whole[node.node_id] = node.node_id, text
        text = node.get_content(metadata_mode=MetadataMode.LLM)
        passages.append(Passage(text, source, node.node_id))
    if not whole:
        return ground(passages, documents)
    return ground(passages, lambda name: whole.get(name) or _find(documents, name))


def ground_text(context: str, source: DocumentSource) -> Grounding:
    """The two contexts where only the retrieved text is known, not its nodes.

    Args:
        context: what was retrieved.
        source: all that it gives is read; a function is called with ``context``.

    Raises:
        DocumentError: there is no document, or it is empty.
    """
    documents = as_documents(source)
    if callable(documents):
        text = documents(context)
        if text is None:
            raise DocumentError(
                "documents(retrieved text) returned None, so there is nothing for the target to "
                "read: return the text of the document that the retrieved text is from"
            )
        documents = text
    everything = ground((), documents)
    if not context.strip():
        return everything
    return replace(everything, draft=context, empty_reason=None)


class _Texts(Mapping[str, str]):
    """Texts of documents, read when they are asked for."""

    def __init__(self, documents: Mapping[str, str | BaseNode]) -> None:
        self._documents = documents

    def __getitem__(self, name: str) -> str:
        return _text(self._documents[name]) or ""

    def __iter__(self) -> Iterator[str]:
        return iter(self._documents)

    def __len__(self) -> int:
        return len(self._documents)


def _text(document: str | BaseNode | None) -> str | None:
    if isinstance(document, BaseNode):
        return document.get_content(metadata_mode=MetadataMode.LLM)
    return document


def _find(documents: Documents, name: str) -> str | None:
    if isinstance(documents, str):
        return documents
    return documents.get(name) if isinstance(documents, Mapping) else documents(name)


def _from_docstore(store: BaseDocumentStore, name: str) -> str | None:
    document = store.get_document(name, raise_error=False)
    if document is None and store.get_ref_doc_info(name) is not None:
        raise DocumentError(
            f"the docstore holds chunks of document {name!r}, but not the document: add it "
            "(docstore.add_documents(documents)), or pass the list of documents instead"
        )
    return _text(document)
