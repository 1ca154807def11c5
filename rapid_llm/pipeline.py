"""Question answering over documents: retrieval, prompts, and an answer by any of four methods."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

from rapid_llm.answers import Answer, AnswerStream, PreparedAnswer
from rapid_llm.arguments import arguments_of, from_arguments
from rapid_llm.chat import checked_variables
from rapid_llm.config import RetrievalConfig, SamplingParams, SpeculationConfig
from rapid_llm.context.builder import ContextBuilder, RetrievalContext
from rapid_llm.context.embedding import Embedder
from rapid_llm.context.prompts import Fitted, fit_documents, room_for_retrieved
from rapid_llm.context.retrieved import SEPARATOR, Passage, texts_by_id
from rapid_llm.context.validation import require_documents, require_text
from rapid_llm.decoder import RapidDecoder
from rapid_llm.encoding import Message, Prompt
from rapid_llm.errors import DocumentError, RapidError
from rapid_llm.interface import GenerationRequest
from rapid_llm.options import changed, given
from rapid_llm.progress import StageProgress
from rapid_llm.questions import CheckedQuestion, Question, checked_history, require_method
from rapid_llm.results import Delta
from rapid_llm.stats import Method

_CONTEXTS = 64  # retrievals kept, so that comparing methods on a question retrieves only once


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

    @arguments_of(Question)
    def ask(self, question: Question) -> Answer:
        """Answer a question; arguments and errors are those of :meth:`stream`."""
        stream = self._stream(question)
        return stream.answer(list(stream))

    def ask_many(
        self, questions: Iterable[str], method: Method = "rapid", **call: Any
    ) -> list[Answer]:
        """Answer several questions at once; the documents are read once.

        At most the decoder's ``max_sequences`` are under way; answers have the law of single ones,
        see :meth:`RapidDecoder.generate_many`.

        Raises:
            DocumentError: one string was given instead of several.
            RapidError: any other error of :meth:`stream`; the message says of which question.
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

        asked = list(questions)

        def prepared(place: int) -> PreparedAnswer | Exception:
            try:
                return self._prepared(from_arguments(Question, asked[place], method, **call))
            except Exception as error:
                if return_exceptions:
                    return error
                raise _of_question(error, place, len(asked)) from error

        return self._answered(list(map(prepared, range(len(asked)))), return_exceptions)

    def _answered(
        self, prepared: Sequence[PreparedAnswer | Exception], return_exceptions: bool
    ) -> Iterator[Answer | Exception]:
        """Answers and errors in order, each as soon as all before it are there."""
        outcomes = list(prepared)
        asked = [
            (place, each.request)
            for place, each in enumerate(prepared)
            if isinstance(each, PreparedAnswer) and each.request is not None
        ]
        waiting = {place for place, _ in asked}
        deltas: list[list[Delta]] = [[] for _ in prepared]
        stream: Any = self.decoder.stream_many(
            [request for _, request in asked], return_exceptions=True
        )
        with closing(stream):
            for place in range(len(outcomes)):
                while place in waiting:
                    index, item = next(stream)
                    at, _ = asked[index]
                    if isinstance(item, Delta):
                        deltas[at].append(item)
                    else:
                        outcomes[at] = item
                    if not isinstance(item, Delta) or item.finish_reason is not None:
                        waiting.remove(at)
                outcome = outcomes[place]
                if isinstance(outcome, PreparedAnswer):
                    answer = outcome.stream(iter(deltas[place]))
                    yield answer.answer(list(answer))
                elif return_exceptions:
                    yield outcome
                else:
                    raise _of_question(outcome, place, len(outcomes)) from outcome

    def chat(self, method: Method = "rapid") -> Conversation:
        """Begin a conversation about the documents; each question sees the earlier ones."""
        return Conversation(self, method)

    @arguments_of(Question)
    def stream(self, question: Question) -> AnswerStream:
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
        return self._stream(question)

    def _stream(self, question: Question) -> AnswerStream:
        prepared = self._prepared(question)
        request = prepared.request
        return prepared.stream(
            iter(())
            if request is None
            else self.decoder.stream(*request.prompts, **request.options)
        )

    def _prepared(self, asked: Question) -> PreparedAnswer:
        """Retrieve for a question, and make its request."""
        require_method(asked.method)
        text = require_text("the question", asked.question)
        variables = checked_variables(asked.chat_template_kwargs)
        question = CheckedQuestion(
            text,
            checked_history(asked.history),
            given(asked.sampling, SamplingParams, "sampling", self.sampling),
            given(asked.speculation, SpeculationConfig, "speculation", self.speculation),
            self.decoder.chat_template_kwargs | variables,
        )
        method = asked.method
        context = None if method == "lc" else self._retrieved(question, asked.progress)
        skipped = context.empty_reason if context is not None else None
        if skipped is not None and self.retrieval.on_empty == "empty":
            return PreparedAnswer(text, method, context, skipped, 0, None)
        prompts = self._prompts("lc" if skipped is not None else method, question, context)
        exact = replace(question.speculation, mode="exact")
        request = GenerationRequest(
            prompts.target,
            prompts.draft,
            sampling=question.sampling,
            speculation=exact if method == "sd" else question.speculation,
            confidence=1.0 if context is None else context.confidence,
            progress=asked.progress,
            chat_template_kwargs=question.variables,
        )
        return PreparedAnswer(text, method, context, skipped, prompts.omitted_tokens, request)

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
        asked = CheckedQuestion(question, (), self.sampling, self.speculation, variables)
        return self._retrieved(asked, progress)

    def _retrieved(
        self, question: CheckedQuestion, progress: StageProgress | None
    ) -> RetrievalContext:
        room = self._room(question)
        query = question.query
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

    def _room(self, question: CheckedQuestion) -> int:
        """Number of tokens that both context windows leave for the retrieved text."""
        decoder = self.decoder
        window = min(decoder.target.context_window, decoder.drafter.context_window)
        most = question.sampling.max_new_tokens
        return room_for_retrieved(
            question.messages, decoder.tokenizer, window, most, question.variables
        )

    def _prompts(
        self, method: Method, question: CheckedQuestion, context: RetrievalContext | None
    ) -> _Prompts:
        found: list[list[Passage]] = [[] for _ in self.documents]
        for chunk in () if context is None or method == "lc" else context.chunks:
            found[chunk.document].append(Passage(chunk.text, start=chunk.start))
        draft = None if context is None or method == "lc" else question.messages(context.text)
        if method == "rag":
            return _Prompts(None, draft, 0)
        whole = self._fitted(question, found)
        return _Prompts(whole.prompt, draft, whole.omitted_tokens)

    def _fitted(self, question: CheckedQuestion, passages: Sequence[Sequence[Passage]]) -> Fitted:
        """The target's prompt, with documents cut to its context window if ``truncate`` says so."""

        def render(texts: Sequence[str]) -> list[Message]:
            return question.messages(SEPARATOR.join(text for text in texts if text.strip()))

        return fit_documents(
            self.documents,
            render,
            self.decoder.tokenizer,
            self.decoder.target.context_window,
            question.sampling.max_new_tokens,
            self.retrieval.truncate,
            passages=passages,
            chat_template_kwargs=question.variables,
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


class _Retrieved(NamedTuple):
    """Retrieval context of a question, and the room that it was retrieved for."""

    room: int
    context: RetrievalContext


class _Prompts(NamedTuple):
    """Prompts of both models; None for a model that does not take part."""

    target: Prompt | None
    draft: Prompt | None
    omitted_tokens: int


def _of_question(error: Exception, place: int, count: int) -> Exception:
    """The error of one of several questions, with its number; another's than ours as it is."""
    if not isinstance(error, RapidError):
        return error
    return type(error)(f"question {place + 1} of {count}: {error}")
