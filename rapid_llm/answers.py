"""Answers to questions about documents: a result with its question and what was retrieved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rapid_llm.context.builder import RetrievalContext
from rapid_llm.interface import GenerationRequest
from rapid_llm.results import Delta, GenerationResult
from rapid_llm.stats import Method, Stats


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


@dataclass(frozen=True)
class PreparedAnswer:
    """A question with its retrieved context, ready to be answered.

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

    def stream(self, deltas: Iterator[Delta]) -> AnswerStream:
        """The stream of the answer with the decoder's deltas; without a request an empty answer."""
        if self.request is None:
            stats = Stats(method="rag" if self.method == "rag" else "lc")
            deltas = iter([Delta("", (), "stop", stats)])
        return AnswerStream(self.question, self.context, self._explained(deltas))

    def _explained(self, deltas: Iterable[Delta]) -> Iterator[Delta]:
        """The decoder's deltas, with what their statistics lack."""
        for delta in deltas:
            delta.stats.draft_skipped = self.skipped or delta.stats.draft_skipped
            delta.stats.omitted_tokens = self.omitted_tokens
            yield delta
