"""Question answering over documents: retrieval, prompts, and an answer by any of four methods."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from rapid_llm.batching import GenerationRequest
from rapid_llm.chat import checked_variables
from rapid_llm.config import RetrievalConfig, SamplingParams, SpeculationConfig
from rapid_llm.context.builder import ContextBuilder, RetrievalContext
from rapid_llm.context.embedding import Embedder
from rapid_llm.context.prompts import (
    Fitted,
    fit_documents,
    retrieval_query,
    room_for_retrieved,
    with_document,
)
from rapid_llm.context.retrieved import SEPARATOR, Passage, texts_by_id
from rapid_llm.context.validation import require_documents, require_text
from rapid_llm.decoder import Delta, GenerationResult, RapidDecoder
from rapid_llm.encoding import Message, Prompt
from rapid_llm.errors import DocumentError, InvalidParameterError
from rapid_llm.options import changed, given
from rapid_llm.progress import StageProgress
from rapid_llm.stats import Method, Stats

METHODS: tuple[Method, ...] = get_args(Method)
"""Callback, called with (stage, done, total): chunks embedded, or prompt tokens read."""

_CONTEXTS = 64  # retrievals kept, so that comparing methods on a question retrieves only once


@dataclass(frozen=True)
class Answer(GenerationResult):
    """An answer with its question and retrieval context.

    Attributes:
        question: the question asked.
        context: the retrieval context that the drafter read; None for ``lc``, which retrieves
            nothing.
    """

    question: str = ""
    context: RetrievalContext | None = None


class AnswerStream(Iterator[Delta]):
    """The deltas of an answer, as they come; closing it stops the generation.

    Attributes:
        question: the question asked.
        context: retrieval context that the drafter reads; None for method ``lc``.
    """

    def __init__(
        self, question: str, context: RetrievalContext | None, deltas: Iterator[Delta]
    ) -> None:
        self.question = question
        self.context = context
        self._deltas = deltas

    def __next__(self) -> Delta:
        return next(self._deltas)

    def close(self) -> None:
        """Stop the generation; the decoder is free again."""
        close = getattr(self._deltas, "close", None)
        if close is not None:
            close()

    def answer(self, deltas: Sequence[Delta]) -> Answer:
        """Join all deltas that this stream has given."""
        result = GenerationResult.from_deltas(deltas)
        return Answer(**vars(result), question=self.question, context=self.context)


class RapidPipeline:
    """Answers questions about documents.

    The target reads the whole documents; the drafter reads the passages retrieved for a question.

    Args:
        decoder: the models.
        documents: one text; a mapping from ids to texts, which the target reads in the order that
            ``order`` names; or several texts, which have no ids, and are read in this order. Blank
            ones are not read.
        embedder: embedding model in any form that :func:`rapid_llm.context.load_embedder` takes;
            by default the config's.
        builder: ready-made retriever, used instead of ``embedder`` and ``retrieval``.
        retrieval: retrieval options.
        sampling: default sampling options.
        speculation: default speculation options.
        options: single retrieval options by name (``chunk_tokens=…``), which override those in
            ``retrieval``.

    Attributes:
        documents: texts in the order in which the target reads them.
        document_ids: ids of the documents, in this order; None without ids.

    Raises:
        DocumentError: a document is not text, all are blank, or two have the same id.
        InvalidParameterError: an unknown option, or a value outside its range.
    """

    def __init__(
        self,
        decoder: RapidDecoder,
        documents: str | Iterable[str] | Mapping[Any, str],
        *,
        embedder: str | Path | Embedder | Any | None = None,
        builder: ContextBuilder | None = None,
        retrieval: RetrievalConfig | None = None,
        sampling: SamplingParams | None = None,
        speculation: SpeculationConfig | None = None,
        **options: Any,
    ) -> None:
        self.decoder = decoder
        self.retrieval = changed(given(retrieval, RetrievalConfig, "retrieval"), options)
        self.document_ids: tuple[str, ...] | None = None
        if isinstance(documents, Mapping):
            named = texts_by_id(documents, self.retrieval.order)
            self.document_ids, documents = tuple(named), tuple(named.values())
        self.documents = require_documents(documents)
        self.sampling = given(sampling, SamplingParams, "sampling")
        self.speculation = given(speculation, SpeculationConfig, "speculation")
        self._builder, self._embedder = builder, embedder
        self._contexts: OrderedDict[str, _Retrieved] = OrderedDict()

    @cached_property
    def builder(self) -> ContextBuilder:
        """The retriever, built at the first use; ``lc`` needs none."""
        return self._builder or ContextBuilder(
            self.decoder.tokenizer,
            self._embedder,
            config=self.retrieval,
            device=self.decoder.target.device,
        )

    def ask(self, question: str, method: Method = "rapid", **call: Any) -> Answer:
        """Answer a question; arguments and errors are those of :meth:`stream`."""
        stream = self.stream(question, method, **call)
        return stream.answer(list(stream))

    def ask_many(
        self, questions: Iterable[str], method: Method = "rapid", **call: Any
    ) -> list[Answer]:
        """Answer several questions at once; the documents are read once.

        At most the decoder's ``max_sequences`` are under way; answers have the law of single ones,
        see :meth:`RapidDecoder.generate_many`.

        Raises:
            DocumentError: one string was given instead of several.
            RapidError: any other error of :meth:`stream`.
        """
        return cast("list[Answer]", list(self.answers(questions, method, **call)))

    def answers(
        self,
        questions: Iterable[str],
        method: Method = "rapid",
        *,
        return_exceptions: bool = False,
        **call: Any,
    ) -> Iterator[Answer | Exception]:
        """:meth:`ask_many`, with each answer as soon as it and those before it are there.

        Args:
            questions: the questions.
            method, call: as for :meth:`stream`.
            return_exceptions: whether a question that failed has its error in the place of an
                answer, and the others go on. Otherwise the first error is raised.
        """
        if isinstance(questions, str):
            raise DocumentError(
                f"questions={questions!r} is one string: give a list of questions, or use ask"
            )

        def prepared(question: str) -> _Prepared | Exception:
            try:
                return self._prepared(question, method, **call)
            except Exception as error:
                if not return_exceptions:
                    raise
                return error

        return self._answered(list(map(prepared, questions)), return_exceptions)

    def _answered(
        self, prepared: Sequence[_Prepared | Exception], return_exceptions: bool
    ) -> Iterator[Answer | Exception]:
        """Answers and errors in order, each as soon as all before it are there."""
        asked = [
            (place, each.request)
            for place, each in enumerate(prepared)
            if isinstance(each, _Prepared) and each.request is not None
        ]
        requests = [request for _, request in asked]
        deltas: list[list[Delta]] = [[] for _ in prepared]
        errors = {place: each for place, each in enumerate(prepared) if isinstance(each, Exception)}
        stream = self.decoder.stream_many(requests, return_exceptions=True)
        for place, each in enumerate(prepared):
            if isinstance(each, _Prepared) and each.request is None:
                deltas[place] = [each.nothing]
        with closing(cast("Generator[tuple[int, Delta | Exception], None, None]", stream)):
            for place, each in enumerate(prepared):
                while place not in errors and not (
                    deltas[place] and deltas[place][-1].finish_reason is not None
                ):
                    index, outcome = next(stream)
                    if isinstance(outcome, Delta):
                        deltas[asked[index][0]].append(outcome)
                    else:
                        errors[asked[index][0]] = outcome
                if place not in errors:
                    assert isinstance(each, _Prepared)
                    yield each.stream(iter(())).answer(list(each.explained(deltas[place])))
                elif return_exceptions:
                    yield errors[place]
                else:
                    raise errors[place]

    def chat(self, method: Method = "rapid") -> Conversation:
        """Begin a conversation about the documents; each question sees the earlier ones."""
        return Conversation(self, method)

    def stream(
        self,
        question: str,
        method: Method = "rapid",
        *,
        history: Sequence[Message] = (),
        sampling: SamplingParams | None = None,
        speculation: SpeculationConfig | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: StageProgress | None = None,
    ) -> AnswerStream:
        """Answer a question and yield one delta per round.

        Args:
            question: question about the documents.
            method: ``rapid``; ``sd``, speculation without knowledge transfer; ``lc``, the target
                alone; ``rag``, the drafter alone. Where nothing was retrieved, all but ``lc``
                follow ``on_empty``, and ``stats.draft_skipped`` gives the reason.
            history: earlier questions and answers, as chat messages that begin with a user's. The
                last two questions are part of what is searched for, as a follow-up ("and the
                second one?") has too few words of its own.
            sampling, speculation: options for this question; by default the pipeline's.
            chat_template_kwargs: variables of the chat template; they override the decoder's.
            progress: callback for the progress of embedding and prefill.

        Raises:
            InvalidParameterError: the method is unknown, or the history does not begin with a
                user's message.
            DocumentError: the question is empty, or not text.
            ContextWindowError: a prompt is too long for its model.
            RapidError: any other error of :meth:`retrieve` and :meth:`RapidDecoder.stream`.
        """
        prepared = self._prepared(
            question,
            method,
            history=history,
            sampling=sampling,
            speculation=speculation,
            chat_template_kwargs=chat_template_kwargs,
            progress=progress,
        )
        request = prepared.request
        if request is None:
            return prepared.stream(prepared.explained([prepared.nothing]))
        deltas = self.decoder.stream(
            request.target_prompt,
            request.draft_prompt,
            sampling=request.sampling,
            speculation=request.speculation,
            confidence=request.confidence,
            progress=request.progress,
            chat_template_kwargs=request.chat_template_kwargs,
        )
        return prepared.stream(prepared.explained(deltas))

    def _prepared(
        self,
        question: str,
        method: Method,
        *,
        history: Sequence[Message] = (),
        sampling: SamplingParams | None = None,
        speculation: SpeculationConfig | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: StageProgress | None = None,
    ) -> _Prepared:
        """Retrieve for a question, and make its request; arguments are those of :meth:`stream`."""
        require_method(method)
        question = require_text("the question", question)
        call = _Call(
            question,
            _checked_history(history),
            self.sampling if sampling is None else given(sampling, SamplingParams, "sampling"),
            self.speculation
            if speculation is None
            else given(speculation, SpeculationConfig, "speculation"),
            self.decoder.chat_template_kwargs | checked_variables(chat_template_kwargs),
        )
        context = None if method == "lc" else self._retrieved(call, progress)
        skipped = context.empty_reason if context is not None else None
        if skipped is not None and self.retrieval.on_empty == "empty":
            return _Prepared(question, method, context, skipped, 0, None)
        prompts = self._prompts("lc" if skipped is not None else method, call, context)
        exact = replace(call.speculation, mode="exact")
        request = GenerationRequest(
            prompts.target,
            prompts.draft,
            call.sampling,
            exact if method == "sd" else call.speculation,
            1.0 if context is None else context.confidence,
            progress,
            call.variables,
        )
        return _Prepared(question, method, context, skipped, prompts.omitted_tokens, request)

    def retrieve(self, question: str, *, progress: StageProgress | None = None) -> RetrievalContext:
        """Retrieve the drafter's context for a question.

        Args:
            question: question about the documents.
            progress: callback for the progress of embedding.

        Raises:
            DocumentError: the question is empty, or not text.
            ModelError: the embedder cannot be loaded, or gives invalid vectors.
            MissingDependencyError: a package of the embedder or retriever is not installed.
        """
        question = require_text("the question", question)
        variables = self.decoder.chat_template_kwargs
        call = _Call(question, (), self.sampling, self.speculation, variables)
        return self._retrieved(call, progress)

    def _retrieved(self, call: _Call, progress: StageProgress | None) -> RetrievalContext:
        room = self._room(call)
        query = call.query
        known = self._contexts.pop(query, None)
        if known is None or known.room != room:  # a history or a longer answer leaves less room
            context = self.builder.build(
                self.documents,
                query,
                room=room,
                progress=progress and (lambda done, total: progress("embed", done, total)),
            )
            known = _Retrieved(room, context)
        self._contexts[query] = known
        if len(self._contexts) > _CONTEXTS:
            self._contexts.popitem(last=False)
        return known.context

    def _room(self, call: _Call) -> int:
        """Number of tokens that both context windows leave for the retrieved text."""
        decoder = self.decoder
        window = min(decoder.target.context_window, decoder.drafter.context_window)
        most = call.sampling.max_new_tokens
        return room_for_retrieved(call.messages, decoder.tokenizer, window, most, call.variables)

    def _prompts(self, method: Method, call: _Call, context: RetrievalContext | None) -> _Prompts:
        found: list[list[Passage]] = [[] for _ in self.documents]
        for chunk in () if context is None or method == "lc" else context.chunks:
            found[chunk.document].append(Passage(chunk.text, start=chunk.start))
        draft = None if context is None or method == "lc" else call.messages(context.text)
        if method == "rag":
            return _Prompts(None, draft, 0)
        whole = self._fitted(call, found)
        return _Prompts(whole.prompt, draft, whole.omitted_tokens)

    def _fitted(self, call: _Call, passages: Sequence[Sequence[Passage]]) -> Fitted:
        """The target's prompt, with documents cut to its context window if ``truncate`` says so."""

        def render(texts: Sequence[str]) -> list[Message]:
            return call.messages(SEPARATOR.join(text for text in texts if text.strip()))

        return fit_documents(
            self.documents,
            render,
            self.decoder.tokenizer,
            self.decoder.target.context_window,
            call.sampling.max_new_tokens,
            self.retrieval.truncate,
            passages=passages,
            chat_template_kwargs=call.variables,
        )


class Conversation:
    """Questions and answers about a pipeline's documents.

    A question that failed, or whose stream was closed early, is not recorded.

    Args:
        pipeline: the pipeline that answers.
        method: method of all answers.

    Attributes:
        messages: questions and answers so far, as chat messages without the documents.
    """

    def __init__(self, pipeline: RapidPipeline, method: Method = "rapid") -> None:
        require_method(method)
        self._pipeline = pipeline
        self._method: Method = method
        self.messages: list[Message] = []

    def ask(self, question: str, **call: Any) -> Answer:
        """Answer a question and record both; arguments as for :meth:`RapidPipeline.stream`."""
        answer = self._pipeline.ask(question, self._method, history=self.messages, **call)
        self._remember(question, answer.text)
        return answer

    def stream(self, question: str, **call: Any) -> AnswerStream:
        """Like :meth:`ask`, but yield one delta per round."""
        stream = self._pipeline.stream(question, self._method, history=self.messages, **call)
        return AnswerStream(stream.question, stream.context, self._recorded(question, stream))

    def _recorded(self, question: str, stream: AnswerStream) -> Iterator[Delta]:
        text = ""
        with closing(stream):
            for delta in stream:
                text += delta.text
                if delta.finish_reason is not None:
                    self._remember(question, text)
                yield delta

    def _remember(self, question: str, text: str) -> None:
        self.messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": text},
        ]


@dataclass(frozen=True)
class _Call:
    """A question with its history and options.

    Attributes:
        question: the question.
        history: earlier chat messages.
        sampling: sampling options.
        speculation: speculation options.
        variables: variables of the chat template.
    """

    question: str
    history: tuple[Message, ...]
    sampling: SamplingParams
    speculation: SpeculationConfig
    variables: Mapping[str, Any]

    @property
    def query(self) -> str:
        """Text to retrieve for: the question and the latest ones of the history."""
        users = [m for m in self.history if isinstance(m, Mapping) and m.get("role") == "user"]
        return retrieval_query(self.question, [str(message.get("content")) for message in users])

    def messages(self, text: str) -> list[Message]:
        """Chat messages of the conversation, with a text in the first one."""
        return with_document([*self.history, {"role": "user", "content": self.question}], text)


@dataclass(frozen=True)
class _Prepared:
    """A question for which was retrieved, ready to be answered.

    Attributes:
        question: the question.
        method: the method asked for.
        context: what was retrieved; None for method ``lc``.
        skipped: reason why nothing was retrieved; None otherwise.
        omitted_tokens: number of document tokens that were left out.
        request: what the decoder is asked; None where nothing is to be read.
    """

    question: str
    method: Method
    context: RetrievalContext | None
    skipped: str | None
    omitted_tokens: int
    request: GenerationRequest | None

    @property
    def nothing(self) -> Delta:
        """The answer where nothing is to be read."""
        stats = Stats(method="rag" if self.method == "rag" else "lc")
        return Delta("", (), "stop", stats)

    def explained(self, deltas: Iterable[Delta]) -> Iterator[Delta]:
        """Deltas of the decoder, with what their statistics lack."""
        return _explained(deltas, self.skipped, self.omitted_tokens)

    def stream(self, deltas: Iterator[Delta]) -> AnswerStream:
        """The stream of the answer with these deltas."""
        return AnswerStream(self.question, self.context, deltas)


class _Retrieved(NamedTuple):
    """Retrieval context of a question, and the room that it was retrieved for."""

    room: int
    context: RetrievalContext


class _Prompts(NamedTuple):
    """Prompts of both models; None for a model that does not take part."""

    target: Prompt | None
    draft: Prompt | None
    omitted_tokens: int


def require_method(method: str) -> None:
    """Validate the name of a method.

    Raises:
        InvalidParameterError: the method is unknown.
    """
    if method not in METHODS:
        raise InvalidParameterError(
            f"method={method!r} is unknown; choose one of {', '.join(METHODS)}"
        )


def _checked_history(history: Sequence[Message]) -> tuple[Message, ...]:
    """The history, validated as far as the documents' place in it asks for."""
    if isinstance(history, str | Mapping) or not isinstance(history, Iterable):
        raise InvalidParameterError(
            f"history of type {type(history).__name__} is not allowed: give a list of chat messages"
        )
    messages = tuple(history)
    first = messages[0] if messages else {"role": "user", "content": ""}
    if not isinstance(first, Mapping) or first.get("role") != "user":
        raise InvalidParameterError(
            f"history begins with {first!r}: begin with a user's message, as "
            "{'role': 'user', 'content': '…'}, which the documents are put into"
        )
    if not isinstance(first.get("content"), str):
        raise InvalidParameterError(
            f"history[0] has the content {first.get('content')!r}: give a str"
        )
    return messages


def _explained(
    deltas: Iterable[Delta], skipped: str | None, omitted_tokens: int
) -> Iterator[Delta]:
    for delta in deltas:
        delta.stats.draft_skipped = skipped or delta.stats.draft_skipped
        delta.stats.omitted_tokens = omitted_tokens
        yield delta
