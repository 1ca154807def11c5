"""The two contexts of a question: what was retrieved, and the documents that it is from."""

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
    """What was retrieved, and what the target reads for it.

    Attributes:
        grounding: the drafter's context, and the documents.
        beside: what the target reads after the documents, as it says more than they do: labels of
            sources, summaries, answers to sub-questions; empty if there is nothing of the kind.
        documents: the ids of what was read whole.
        confidence: of the retrieval, in [0, 1].
    """

    grounding: Grounding
    beside: str
    documents: tuple[str, ...]
    confidence: float

    @property
    def empty(self) -> bool:
        """Whether there is nothing to read."""
        return not self.grounding.texts and not self.beside


def ground_nodes(
    nodes: Sequence[NodeWithScore],
    library: Library,
    on_empty: OnEmpty = "empty",
    order: Order = "canonical",
) -> Retrieved:
    """The contexts where the nodes are known.

    A node of no document is read as it is, behind the documents or, in the order given, in its
    place among them.

    Raises:
        DocumentError: a node's document is not there; see
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
    # Behind the documents: it may be another for each question.
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
    """The contexts where only the retrieved text is known, and the confidence of the retrieval.

    The target reads the documents that hold a passage of it; those of a function, which is called
    with ``context``, in any case. Text that is in no document stays as it is.

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
    """By id, the files of documents that say it: ids may change when files are read again."""
    return {document.name: document.file for document in documents if document.file is not None}


def _passage(node: BaseNode, shown: str, source: FullText) -> Passage:
    excerpt = node.get_content(metadata_mode=MetadataMode.NONE)
    return Passage(shown, source.name, node.node_id, excerpt=excerpt)


def _is_labelled(node: BaseNode, source: FullText) -> bool:
    """Whether lines are shown beside its text that neither its document shows nor what was split.

    So are a source's number in the metadata, a heading that a parser added, and the like.
    """
    known = source.heads
    if node.source_node is not None:
        split = node.model_copy(update={"metadata": node.source_node.metadata})
        known = known | lines_of(split.get_metadata_str(MetadataMode.LLM))
    return not lines_around(node) <= known


def _says_more(passage: Passage, source: FullText, library: Library) -> bool:
    """Whether a passage is more than what was cut out of its document."""
    text = passage.excerpt or passage.text
    if source.holds(text) or not source.body.strip():
        return False
    # One text that is given for all may be another form of what was indexed.
    return source is not library.only or bool(locate(text, [source]).passages)
