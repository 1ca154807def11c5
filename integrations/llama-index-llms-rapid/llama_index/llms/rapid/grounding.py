"""Contexts of drafter and target: retrieved text, and the documents that it is from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

from llama_index.llms.rapid.documents import Library
from llama_index.llms.rapid.fulltext import FullText, lines_around, lines_of
from llama_index.llms.rapid.passages import locate
from llama_index.llms.rapid.statistics import confidence_of
from rapid_llm.config import OnEmpty, Order
from rapid_llm.context.ordering import LAST
from rapid_llm.context.retrieved import SEPARATOR, Grounding, Passage, ground
from rapid_llm.errors import DocumentError


@dataclass(frozen=True)
class Retrieved:
    """Contexts of both models for one question.

    Attributes:
        grounding: the drafter's context, and the documents.
        beside: text for the target after the documents that they do not contain: labels of sources,
            summaries, answers to sub-questions; empty if there is none.
        documents: ids of the documents that are read whole.
        confidence: confidence of the retrieval, in [0, 1].
    """

    grounding: Grounding
    beside: str
    documents: tuple[str, ...]
    confidence: float

    @property
    def empty(self) -> bool:
        """Whether there is no text to read."""
        return not self.grounding.texts and not self.beside


def ground_nodes(
    nodes: Sequence[NodeWithScore],
    library: Library,
    on_empty: OnEmpty = "empty",
    order: Order = "canonical",
) -> Retrieved:
    """Contexts from retrieved nodes.

    A node without a document is read as it is, after the documents, or with ``order="given"`` at
    its position among them.

    Args:
        nodes: retrieved nodes, best first.
        library: the documents.
        on_empty: action where nothing was retrieved.
        order: order of the documents.

    Raises:
        DocumentError: a node's document does not exist; see
            :func:`rapid_llm.context.retrieved.ground`.
    """
    library = library.now()
    sources: dict[str, FullText] = {}
    own: set[str] = set()
    labelled: set[str] = set()
    passages = []
    for node in (scored.node for scored in nodes):
        shown = node.get_content(metadata_mode=MetadataMode.LLM)
        if not shown.strip():
            continue
        source = library.source(node)
        if source is None:
            source = FullText(node.node_id, (shown,))
            own.add(node.node_id)
        elif _is_labelled(node, source):
            labelled.add(node.node_id)
        sources[source.name] = source
        passages.append(_passage(node, shown, source))
    if not passages and on_empty == "read_all":
        sources = {document.name: document for document in library.all()}
        if not sources:
            raise DocumentError(
                "nothing was retrieved, and on_empty='read_all' finds no documents (a function "
                "cannot list them, a docstore may hold chunks only): give a list or a mapping, or "
                "leave it at 'empty'"
            )
    texts = {name: source.shown for name, source in sources.items()}
    # After the documents, because these nodes may change with each question.
    titles = _files(sources.values()) | {name: LAST + texts[name] for name in own & texts.keys()}
    grounding = ground(passages, texts, on_empty=on_empty, order=order, titles=titles)
    beside = [
        passage.text
        for passage in grounding.passages
        if passage.document_id not in own
        and (
            passage.id in labelled
            or _says_more(passage, sources[passage.document_id or ""], library)
        )
    ]
    named = (name for name in grounding.document_ids if name and name not in own)
    return Retrieved(grounding, SEPARATOR.join(beside), tuple(named), confidence_of(nodes))


def ground_text(
    context: str,
    library: Library,
    on_empty: OnEmpty = "empty",
    confidence: float = 1.0,
    order: Order = "canonical",
) -> Retrieved:
    """Contexts from the retrieved text alone.

    The target reads the documents that contain a passage of the text; a function is called with the
    text and returns the document. Text that is in no document is read as it is.

    Args:
        context: retrieved text.
        library: the documents.
        on_empty: action where the text is blank.
        confidence: confidence of the retrieval, in [0, 1].
        order: order of the documents.

    Raises:
        DocumentError: the function returned None, or a document is empty.
    """
    library = library.now()
    if not context.strip():
        return ground_nodes((), library, on_empty, order)
    if library.function is not None:
        text = library.function(context)
        if text is None:
            raise DocumentError(
                "documents(retrieved text) returned None, so there is nothing for the target to "
                "read: return the text of the document that the retrieved text is from"
            )
        grounding = ground([Passage(context, "")], {"": FullText("", (text,)).shown})
        return Retrieved(grounding, "", (), confidence)
    documents = {document.name: document for document in library.all()}
    passages, whole = locate(context, list(documents.values()))
    texts = {p.document_id: documents[p.document_id or ""].shown for p in passages}
    titles = _files(documents.values())
    grounding = ground(passages, texts, order=order, titles=titles)
    grounding = replace(grounding, draft=context, empty_reason=None)
    named = tuple(name for name in grounding.document_ids if name)
    return Retrieved(grounding, "" if whole else context, named, confidence)


def _files(documents: Iterable[FullText]) -> dict[str, str]:
    """Files of documents by id, because ids may change when files are read again."""
    return {document.name: document.file for document in documents if document.file is not None}


def _passage(node: BaseNode, shown: str, source: FullText) -> Passage:
    excerpt = node.get_content(metadata_mode=MetadataMode.NONE)
    return Passage(shown, source.name, node.node_id, excerpt=excerpt)


def _is_labelled(node: BaseNode, source: FullText) -> bool:
    """Whether a node shows lines with its text that neither the document nor its split part has.

    Examples are a source's number in the metadata and a heading that a parser has added.
    """
    known = source.heads
    if node.source_node is not None:
        split = node.model_copy(update={"metadata": node.source_node.metadata})
        known = known | lines_of(split.get_metadata_str(MetadataMode.LLM))
    return not lines_around(node) <= known


def _says_more(passage: Passage, source: FullText, library: Library) -> bool:
    """Whether a passage has text that its document does not contain."""
    text = passage.excerpt or passage.text
    if source.holds(text) or not source.body.strip():
        return False
    # A single text given for all nodes may be another form of the indexed document.
    return source is not library.only or bool(locate(text, [source]).passages)
