"""From documents and a question to an answer, by any of the four methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.context.builder import ContextBuilder, RetrievalContext
from rapid_llm.context.prompts import build_messages, fit_document
from rapid_llm.decoder import Chunk, GenerationResult, RapidDecoder
from rapid_llm.encoding import Prompt
from rapid_llm.errors import InvalidParameterError
from rapid_llm.stats import Method

METHODS: tuple[Method, ...] = get_args(Method)
Stage = Literal["embed", "draft", "target"]
Progress = Callable[[Stage, int, int], None]
"""Called with (stage, done, total): chunks embedded, or tokens of a prompt read."""


class Inquiry:
    """One question on some documents.

    What was retrieved is kept, so that several methods can be compared on the same input.

    Args:
        decoder: the models.
        builder: retrieves the drafter's context; None will do for ``lc``, which needs none.
        documents: their texts; the target reads them in this order.
        question: what is asked about them.
        sampling: how tokens are drawn.
        speculation: how ``rapid`` and ``sd`` draft; ``sd`` uses mode ``exact``.
        truncate: ``middle`` leaves out the middle of documents too long for the target's window;
            retrieval still sees all of them.
        progress: told how far embedding and reading have come.
    """

    def __init__(
        self,
        decoder: RapidDecoder,
        builder: ContextBuilder | None,
        documents: Sequence[str],
        question: str,
        *,
        sampling: SamplingParams | None = None,
        speculation: SpeculationConfig | None = None,
        truncate: Literal["middle"] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.decoder = decoder
        self.documents = tuple(documents)
        self.question = question
        self._builder = builder
        self._sampling = sampling or SamplingParams()
        self._speculation = speculation or SpeculationConfig()
        self._truncate = truncate
        self._progress = progress

    @cached_property
    def context(self) -> RetrievalContext:
        """What the drafter reads; retrieved when first asked for.

        Raises:
            InvalidParameterError: there is no context builder.
            DocumentError: a document or the question is empty or not text.
            ModelError, MissingDependencyError: the embedder cannot be loaded.
        """
        if self._builder is None:
            raise InvalidParameterError(
                "builder=None retrieves nothing; give a ContextBuilder, or use method 'lc'"
            )
        progress = self._progress
        return self._builder.build(
            self.documents,
            self.question,
            progress=progress and (lambda done, total: progress("embed", done, total)),
        )

    def stream(self, method: Method = "rapid") -> Iterator[Chunk]:
        """Answer, a chunk a round.

        Args:
            method: ``rapid``; ``sd``, speculation without knowledge transfer; ``lc``, the target
                alone; ``rag``, the drafter alone. Where nothing was retrieved, all but
                ``lc`` fall back to it, and ``stats.draft_skipped`` says why.

        Raises:
            InvalidParameterError: the method is unknown.
            ContextWindowError: a prompt is too long for its model.
            RapidError: whatever else :attr:`context` and :meth:`RapidDecoder.stream` raise.
        """
        run = self._plan(method)
        chunks = self.decoder.stream(run.target, run.draft, **self._options(run))
        return _explained(chunks, run.draft_skipped)

    def answer(self, method: Method = "rapid") -> GenerationResult:
        """The finished answer; see :meth:`stream`."""
        return GenerationResult.from_chunks(list(self.stream(method)))

    def _plan(self, method: Method) -> _Run:
        require_method(method)
        if method == "lc":
            return _Run(self._target_prompt, None)
        if self.context.empty_reason is not None:
            return _Run(self._target_prompt, None, draft_skipped=self.context.empty_reason)
        draft = build_messages(self.context.text, self.question)
        if method == "rag":
            return _Run(None, draft)
        return _Run(
            self._target_prompt,
            draft,
            exact=method == "sd",
            confidence=self.context.confidence,
        )

    def _options(self, run: _Run) -> dict[str, Any]:
        speculation = self._speculation
        return {
            "sampling": self._sampling,
            "speculation": replace(speculation, mode="exact") if run.exact else speculation,
            "confidence": run.confidence,
            "progress": self._progress,
        }

    @cached_property
    def _target_prompt(self) -> Prompt:
        return fit_document(
            "\n\n".join(self.documents),
            self.question,
            self.decoder.tokenizer,
            self.decoder.target.context_window,
            self._sampling.max_new_tokens,
            self._truncate,
        )


class _Run(NamedTuple):
    """What a method hands to the decoder."""

    target: Prompt | None
    draft: Prompt | None
    exact: bool = False
    confidence: float = 1.0
    draft_skipped: str | None = None


def require_method(method: str) -> None:
    """Raises InvalidParameterError if there is no such method."""
    if method not in METHODS:
        raise InvalidParameterError(
            f"method={method!r} is unknown; choose one of {', '.join(METHODS)}"
        )


def _explained(chunks: Iterator[Chunk], draft_skipped: str | None) -> Iterator[Chunk]:
    for chunk in chunks:
        if draft_skipped is not None:
            chunk.stats.draft_skipped = draft_skipped
        yield chunk
