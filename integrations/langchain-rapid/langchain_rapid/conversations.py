"""Chat messages for target and drafter, with the chunks of a retriever or of an agent's tool.

A tool tells its documents by its artifact, as ``create_retriever_tool`` does with
``response_format="content_and_artifact"``; the text of its message holds them as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, HumanMessage, SystemMessage
from rapid_llm.config import Order, RetrievalConfig
from rapid_llm.context.retrieved import SEPARATOR
from rapid_llm.options import require

from langchain_rapid.documents import FullDocuments, id_text, ids_of
from langchain_rapid.grounding import Source, confidence_of, find_sources
from langchain_rapid.messages import documents_of
from langchain_rapid.places import Place
from langchain_rapid.window import places_of

if TYPE_CHECKING:
    from langchain_rapid.settings import Contexts


class Conversation(NamedTuple):
    """What both models read of a chat.

    Attributes:
        target: the target's messages.
        draft: the drafter's; None without documents for them.
        found: arguments of the call that tell it what was retrieved.
    """

    target: list[BaseMessage]
    draft: list[BaseMessage] | None
    found: dict[str, Any]

    def as_call(self) -> tuple[list[BaseMessage], dict[str, Any]]:
        """The target's messages, and the arguments of its call, the draft among them."""
        draft = {} if self.draft is None else {"draft_messages": self.draft}
        return self.target, self.found | draft


def around_question(
    messages: Sequence[BaseMessage], index: int, contexts: Contexts
) -> Conversation:
    """Both models' messages, with their contexts around the question.

    Args:
        messages: the conversation.
        index: index of the question.
        contexts: what a retriever found for it.
    """

    def around(content: str) -> list[BaseMessage]:
        question = messages[index].model_copy(update={"content": content})
        return [*messages[:index], question, *messages[index + 1 :]]

    places = [_in_message(index, place) for place in contexts.found["documents_at"]]
    draft = None if contexts.draft is None else around(contexts.draft)
    return Conversation(around(contexts.target), draft, contexts.found | {"documents_at": places})


def with_tool_documents(
    messages: Sequence[BaseMessage],
    documents: FullDocuments | None,
    order: Order,
    confidence: float | None = None,
) -> Conversation:
    """Both models' messages of an agent.

    Where the full documents are known, the target reads each at the first result that a chunk of
    it is in, in the place of its chunks, and the drafter reads the messages as they are. Otherwise
    the target does, and the drafter reads the system messages and the last question with what was
    found for it.

    Args:
        messages: the conversation.
        documents: the full documents behind the tools' chunks; None if they are not known.
        order: order of documents within one result, see :func:`find_sources`.
        confidence: of what was retrieved, in [0, 1]; None takes it from the chunks' scores.

    Raises:
        InvalidParameterError: there is no such order.
        DocumentError: a chunk is of an unknown document, or does not say its document.
    """
    require(RetrievalConfig, order=order)
    if documents is not None:
        made, chunks = _with_whole_documents(messages, documents, order)
    else:
        made, chunks = _with_last_question(messages)
    sure = confidence_of(chunks) if confidence is None else confidence
    return made._replace(found=made.found | {"confidence": sure})


def _with_last_question(
    messages: Sequence[BaseMessage],
) -> tuple[Conversation, list[Document]]:
    """Both models' messages without full documents, and the chunks that the drafter reads."""
    last = max((i for i, each in enumerate(messages) if isinstance(each, HumanMessage)), default=0)
    system = [each for each in messages[:last] if isinstance(each, SystemMessage)]
    draft = [*system, *messages[last:]]
    chunks = [chunk for message in draft for chunk in documents_of(message)]
    found = {"retrieved": [_described(chunk) for chunk in chunks]}
    return Conversation(list(messages), draft if chunks else None, found), chunks


def _with_whole_documents(
    messages: Sequence[BaseMessage], documents: FullDocuments, order: Order
) -> tuple[Conversation, list[Document]]:
    """Both models' messages with full documents, and the chunks that the drafter reads."""
    target = list(messages)
    chunks: list[Document] = []
    retrieved: list[dict[str, Any]] = []
    places: list[Place] = []
    read: set[str] = set()
    for index, message in enumerate(messages):
        own = documents_of(message)
        if not own:
            continue
        sources = find_sources(own, documents, order=order)
        chunks += sources.chunks
        retrieved += sources.retrieved
        blocks = [_block(source, read) for source in sources.full]
        new = {source.document.page_content for source in sources.full} - read
        if not new:
            continue
        read |= new
        content = SEPARATOR.join(blocks)
        target[index] = message.model_copy(update={"content": content})
        inside = places_of(sources.full, blocks, SEPARATOR, [content])
        places += [_in_message(index, place) for place in inside]
    found = {"retrieved": retrieved, "documents_at": places}
    return Conversation(target, list(messages), found), chunks


def _in_message(index: int, place: Place) -> Place:
    return {**place, "message": index}


def _block(source: Source, read: set[str]) -> str:
    """A document, or, of one that was read before, its chunks."""
    whole = source.document.page_content
    if whole not in read:
        return whole
    return SEPARATOR.join(cited.chunk.page_content for cited in source.cited)


def _described(chunk: Document) -> dict[str, Any]:
    ids = ids_of(chunk)
    known = {
        "id": chunk.id,
        "document_id": id_text(ids[0][1]) if ids else None,
        "start_index": chunk.metadata.get("start_index"),
    }
    return {name: value for name, value in known.items() if value is not None}
