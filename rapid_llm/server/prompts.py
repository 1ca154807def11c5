"""Prompts of both models for a request: its documents, and the chunks retrieved from them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from rapid_llm.chat import checked_message
from rapid_llm.config import RetrievalConfig, SamplingParams
from rapid_llm.context.builder import ContextBuilder
from rapid_llm.context.embedder_loading import default_embedder, load_embedder
from rapid_llm.context.embedding import Embedder
from rapid_llm.context.prompts import (
    fit_documents,
    retrieval_query,
    room_for_retrieved,
    with_document,
)
from rapid_llm.context.retrieved import SEPARATOR, Passage, ground, texts_by_id
from rapid_llm.errors import DocumentError
from rapid_llm.options import changed
from rapid_llm.server.errors import ApiError, logger, of_field
from rapid_llm.server.files import FileStore
from rapid_llm.server.protocol import DataDocument, FileDocument, Request, TextDocument
from rapid_llm.stats import Method

if TYPE_CHECKING:
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.encoding import Message

_BUILDERS = 16  # retrievers kept, one for each set of options that requests bring


@dataclass(frozen=True)
class Prompts:
    """Prompts of both models.

    Attributes:
        target: chat messages of the target's prompt; None where the drafter answers alone.
        draft: chat messages of the draft prompt; None where nothing drafts.
        confidence: confidence of the retrieval, in [0, 1].
        skipped: reason why nothing was retrieved; None otherwise.
        empty: whether the answer is empty, as nothing was retrieved and nothing is read.
        omitted_tokens: number of the documents' tokens that were left out.
        document_ids: ids of the documents in the order in which the target reads them.
        chunks: retrieved chunks: the id of the document, ``start`` and ``end`` in characters of its
            text (null if unknown), score (null if unknown), and the text.
    """

    target: Sequence[Message] | None
    draft: Sequence[Message] | None
    confidence: float = 1.0
    skipped: str | None = None
    empty: bool = False
    omitted_tokens: int = 0
    document_ids: tuple[str, ...] = ()
    chunks: tuple[dict[str, Any], ...] = ()

    def report(self) -> dict[str, Any]:
        """What an answer says of its documents."""
        return {"document_ids": list(self.document_ids), "chunks": list(self.chunks)}


@dataclass(frozen=True)
class _Document:
    """A document as the target reads it, under its title."""

    id: str
    text: str
    title: str | None = None

    @property
    def heading(self) -> str:
        return f"{self.title}\n\n" if self.title else ""

    @property
    def whole(self) -> str:
        return self.heading + self.text


@dataclass(frozen=True)
class _Draft:
    """The drafter's context, before it is a prompt."""

    text: str
    passages: list[list[Passage]]
    confidence: float = 1.0
    skipped: str | None = None
    chunks: tuple[dict[str, Any], ...] = field(default=())


class PromptBuilder:
    """Builds the prompts of both models for requests.

    Args:
        decoder: the models.
        files: uploaded documents.
        retrieval: default retrieval options.
        most: maximum number of documents, and of chunks, of a request.
        embedder: embedding model in any form that ``load_embedder`` takes; by default the config's.
            It is loaded when a request first needs it.
    """

    def __init__(
        self,
        decoder: RapidDecoder,
        files: FileStore,
        retrieval: RetrievalConfig,
        most: int,
        embedder: Any = None,
    ) -> None:
        self._decoder = decoder
        self._files = files
        self._retrieval = retrieval
        self._most = most
        self._source = embedder or retrieval.embedder or default_embedder()
        self._embedder: Embedder | None = None
        self._builders: OrderedDict[RetrievalConfig, ContextBuilder] = OrderedDict()
        self._lock = Lock()

    def build(
        self,
        request: Request,
        messages: Sequence[Mapping[str, Any]],
        draft_messages: Sequence[Mapping[str, Any]] | None,
        sampling: SamplingParams,
        variables: Mapping[str, Any],
        check: Callable[[], None],
    ) -> Prompts:
        """Build the prompts of a request; the documents stand in the first user message.

        Args:
            request: the request.
            messages: chat messages, without the documents.
            draft_messages: chat messages of the draft prompt, if the caller has one.
            sampling: sampling options.
            variables: variables of the chat template.
            check: function that raises once nobody waits for the answer.

        Raises:
            ApiError: a message is malformed, there is no question, a document is blank, two have
                one id, a chunk's is not among them, there is no such file, or there are too many
                documents or chunks.
            ContextWindowError: the documents do not fit.
        """
        with of_field("messages"):
            chat = [checked_message(message) for message in messages]
        with of_field("rapid.draft_messages"):
            own = None if draft_messages is None else [checked_message(m) for m in draft_messages]
        method: Method = request.rapid.method
        if method == "lc":
            own = None  # the target answers alone
        if request.documents is None:
            if method == "rag":
                return Prompts(None, own, request.rapid.confidence)
            return Prompts(chat, own, request.rapid.confidence)
        options = changed(self._retrieval, request.options(RetrievalConfig))
        self._limit(request)
        with of_field("documents", DocumentError):
            documents = self._documents(request, options)
        found = _Draft("", [[] for _ in documents])
        if method != "lc" and own is None:
            found = self._draft(request, documents, chat, options, sampling, variables, check)
        names = tuple(document.id for document in documents)
        if found.skipped is not None and options.on_empty == "empty":
            return Prompts(None, None, skipped=found.skipped, empty=True, document_ids=names)
        prompts = Prompts(
            None,
            with_document(chat, found.text) if found.text else own,
            min(found.confidence, request.rapid.confidence),
            skipped=found.skipped,
            document_ids=names,
            chunks=found.chunks,
        )
        if method == "rag" and prompts.draft is not None:
            return prompts

        def render(texts: Sequence[str]) -> list[Message]:
            return with_document(chat, SEPARATOR.join(text for text in texts if text.strip()))

        whole = fit_documents(
            [document.whole for document in documents],
            render,
            self._decoder.tokenizer,
            self._decoder.target.context_window,
            sampling.max_new_tokens,
            options.truncate,
            passages=found.passages,
            chat_template_kwargs=variables,
        )
        target = cast("Sequence[Message]", whole.prompt)  # what render returns
        return replace(prompts, target=target, omitted_tokens=whole.omitted_tokens)

    def _limit(self, request: Request) -> None:
        for name in ("documents", "chunks"):
            count = len(getattr(request, name) or ())
            if count > self._most:
                raise ApiError(
                    413,
                    f"{count} {name} were given, at most {self._most} are taken: join some",
                    param=name,
                )

    def _documents(self, request: Request, options: RetrievalConfig) -> list[_Document]:
        """The documents in the order in which the target reads them; blank ones are left out."""
        read: dict[str, _Document] = {}
        for number, given in enumerate(request.documents or ()):
            document = self._document(given, number)
            if document.id in read:
                raise DocumentError(
                    f"two documents have the id {document.id!r}: give each an id of its own"
                )
            read[document.id] = document
        order = texts_by_id({name: each.text for name, each in read.items()}, options.order)
        documents = [read[name] for name, text in order.items() if text.strip()]
        if not documents:
            raise DocumentError(
                "all documents are empty: give at least one text that is more than white space"
                if read
                else "documents is empty: give at least one document, or leave it out"
            )
        return documents

    def _document(self, given: Any, number: int) -> _Document:
        name = given.id or f"doc_{number}"
        if isinstance(given, FileDocument):
            return _Document(
                given.id or given.file_id, self._files.text(given.file_id), given.title
            )
        if isinstance(given, DataDocument):
            return _Document(name, _text_of(given.data))
        assert isinstance(given, TextDocument)
        return _Document(name, given.text, given.title)

    def _draft(
        self,
        request: Request,
        documents: Sequence[_Document],
        chat: Sequence[Mapping[str, Any]],
        options: RetrievalConfig,
        sampling: SamplingParams,
        variables: Mapping[str, Any],
        check: Callable[[], None],
    ) -> _Draft:
        if request.chunks is not None:
            with of_field("chunks", DocumentError):
                return self._given(request.chunks, documents, options)
        questions = [str(message["content"]) for message in chat if message["role"] == "user"]
        if not questions:
            raise ApiError(
                400,
                "no message has the role 'user', which documents are searched for: add the "
                "question",
                param="messages",
            )
        window = min(self._decoder.target.context_window, self._decoder.drafter.context_window)
        context = self._builder(options).build(
            [document.whole for document in documents],
            retrieval_query(questions[-1], questions[:-1]),
            room=room_for_retrieved(
                partial(with_document, chat),
                self._decoder.tokenizer,
                window,
                sampling.max_new_tokens,
                variables,
            ),
            progress=lambda done, total: check(),
        )
        passages: list[list[Passage]] = [[] for _ in documents]
        chunks = []
        for chunk in context.chunks:
            document = documents[chunk.document]
            passages[chunk.document].append(Passage(chunk.text, start=chunk.start))
            above = len(document.heading)
            chunks.append(
                {
                    "document_id": document.id,
                    "start": max(0, chunk.start - above),
                    "end": max(0, chunk.end - above),
                    "score": chunk.score,
                    "text": chunk.text,
                }
            )
        return _Draft(
            context.text, passages, context.confidence, context.empty_reason, tuple(chunks)
        )

    def _given(
        self, given: Sequence[Any], documents: Sequence[_Document], options: RetrievalConfig
    ) -> _Draft:
        """The drafter's context of chunks that the caller retrieved."""
        only = documents[0].id if len(documents) == 1 else None
        passages = [
            Passage(
                _text_of(chunk.data) if isinstance(chunk, DataDocument) else chunk.text,
                chunk.document_id if chunk.document_id is not None else only,
                chunk.id,
            )
            for chunk in given
        ]
        texts = {document.id: document.text for document in documents}
        found = ground(passages, texts, on_empty=options.on_empty, order=options.order)
        of = {document.id: number for number, document in enumerate(documents)}
        by_document: list[list[Passage]] = [[] for _ in documents]
        chunks = []
        for passage in found.passages:
            assert passage.document_id is not None
            start: int | None = texts[passage.document_id].find(passage.text)
            start = None if start == -1 else start
            above = len(documents[of[passage.document_id]].heading)
            place = None if start is None else start + above
            by_document[of[passage.document_id]].append(replace(passage, start=place))
            chunks.append(
                {
                    "document_id": passage.document_id,
                    "id": passage.id,
                    "start": start,
                    "end": None if start is None else start + len(passage.text),
                    "score": None,
                    "text": passage.text,
                }
            )
        return _Draft(found.draft, by_document, 1.0, found.empty_reason, tuple(chunks))

    def _builder(self, options: RetrievalConfig) -> ContextBuilder:
        with self._lock:
            device = str(self._decoder.target.device)
            if self._embedder is None and options.retriever != "bm25":
                self._embedder = self._load(device)
            builder = self._builders.pop(options, None) or ContextBuilder(
                self._decoder.tokenizer, self._embedder, config=options, device=device
            )
            self._builders[options] = builder
            if len(self._builders) > _BUILDERS:
                self._builders.popitem(last=False)
            return builder

    def _load(self, device: str) -> Embedder:
        if not isinstance(self._source, str | Path):
            return load_embedder(self._source, device)
        started = time.monotonic()
        logger.info(
            "the embedder %s is loaded, for the first documents without chunks", self._source
        )
        embedder = load_embedder(self._source, device)
        logger.info("the embedder is loaded, after %.1f s", time.monotonic() - started)
        return embedder


def _text_of(data: str | Mapping[str, Any]) -> str:
    """Text of Cohere's ``data``: a text, or fields of which each is a line."""
    if isinstance(data, str):
        return data
    if data.keys() == {"text"} and isinstance(data["text"], str):
        return data["text"]
    return "\n".join(f"{name}: {value}" for name, value in data.items())
