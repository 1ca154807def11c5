"""From documents and a question to an answer, by any of the four methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

from rapid_llm.chat import checked_variables
from rapid_llm.config import OnEmpty, SamplingParams, SpeculationConfig, require_on_empty
from rapid_llm.context.builder import ContextBuilder, RetrievalContext
from rapid_llm.context.chunking import MIN_CHUNK_TOKENS
from rapid_llm.context.prompts import Fitted, Truncate, build_messages, fit_documents
from rapid_llm.context.retrieved import SEPARATOR, Passage
from rapid_llm.context.validation import require_documents, require_text
from rapid_llm.decoder import Chunk, GenerationResult, RapidDecoder
from rapid_llm.encoding import Message, Prompt, encode_prompt
from rapid_llm.errors import InvalidParameterError
from rapid_llm.stats import Method, Stats

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
        documents: their texts; the target reads them in this order, but for blank ones.
        question: what is asked about them.
        sampling: how tokens are drawn.
        speculation: how ``rapid`` and ``sd`` draft; ``sd`` uses mode ``exact``.
        truncate: ``middle`` cuts documents too long for the target's window, but not the passages
            retrieved from them (``lc`` retrieves none), so that each question reads a cut of its
            own; ``stats.omitted_tokens`` says how much was left out. Retrieval sees all of them.
        on_empty: what the methods that retrieve do where nothing was retrieved: ``empty`` reads
            nothing and answers nothing, ``read_all`` falls back to ``lc``.
        progress: told how far embedding and reading have come.
        chat_template_kwargs: variables of the chat template, before the decoder's own.

    Raises:
        InvalidParameterError: ``on_empty`` is unknown.
        DocumentError: a document or the question is not text, the question is empty, or all
            documents are.
    """

    def __init__(
        self,
        decoder: RapidDecoder,
        builder: ContextBuilder | None,
        documents: str | Sequence[str],
        question: str,
        *,
        sampling: SamplingParams | None = None,
        speculation: SpeculationConfig | None = None,
        truncate: Truncate | None = None,
        on_empty: OnEmpty = "empty",
        progress: Progress | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        require_on_empty(on_empty)
        self.decoder = decoder
        self.question = require_text("the question", question)
        self.documents = require_documents(documents)
        self._builder = builder
        self._sampling = sampling or SamplingParams()
        self._speculation = speculation or SpeculationConfig()
        self._truncate: Truncate | None = truncate
        self._on_empty = on_empty
        self._progress = progress
        self._variables = decoder.chat_template_kwargs | checked_variables(chat_template_kwargs)

    @cached_property
    def context(self) -> RetrievalContext:
        """What the drafter reads; retrieved when first asked for.

        Raises:
            InvalidParameterError: there is no context builder.
            ModelError, MissingDependencyError: the embedder cannot be loaded, or gives vectors
                that are none.
        """
        if self._builder is None:
            raise InvalidParameterError(
                "builder=None retrieves nothing; give a ContextBuilder, or use method 'lc'"
            )
        progress = self._progress
        return self._builder.build(
            self.documents,
            self.question,
            room=self._room,
            progress=progress and (lambda done, total: progress("embed", done, total)),
        )

    @property
    def _room(self) -> int:
        """Tokens that both models have for what is retrieved."""
        decoder = self.decoder
        frame = build_messages(".", self.question)
        window = min(decoder.target.context_window, decoder.drafter.context_window)
        answer = min(self._sampling.max_new_tokens, window // 2)
        tokens = len(encode_prompt(frame, decoder.tokenizer, self._variables))
        return max(MIN_CHUNK_TOKENS, window - answer - tokens)

    def stream(self, method: Method = "rapid") -> Iterator[Chunk]:
        """Answer, a chunk a round.

        Args:
            method: ``rapid``; ``sd``, speculation without knowledge transfer; ``lc``, the target
                alone; ``rag``, the drafter alone. Where nothing was retrieved, all but ``lc`` do
                what ``on_empty`` says, and ``stats.draft_skipped`` says why.

        Raises:
            InvalidParameterError: the method is unknown.
            ContextWindowError: a prompt is too long for its model.
            RapidError: whatever else :attr:`context` and :meth:`RapidDecoder.stream` raise.
        """
        require_method(method)
        skipped = None if method == "lc" else self.context.empty_reason
        if skipped is not None and self._on_empty == "empty":
            stats = Stats(method="rag" if method == "rag" else "lc")
            return _explained(iter([Chunk("", (), "stop", stats)]), skipped, 0)
        run = self._plan("lc" if skipped is not None else method)
        chunks = self.decoder.stream(run.target, run.draft, **self._options(run))
        return _explained(chunks, skipped, run.omitted_tokens)

    def answer(self, method: Method = "rapid") -> GenerationResult:
        """The finished answer; see :meth:`stream`."""
        return GenerationResult.from_chunks(list(self.stream(method)))

    def _plan(self, method: Method) -> _Run:
        if method == "lc":
            whole = self._fitted([()] * len(self.documents))
            return _Run(whole.prompt, None, whole.omitted_tokens)
        draft = build_messages(self.context.text, self.question)
        if method == "rag":
            return _Run(None, draft)
        whole = self._fitted(self._passages())
        return _Run(
            whole.prompt,
            draft,
            whole.omitted_tokens,
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
            "chat_template_kwargs": self._variables,
        }

    def _passages(self) -> list[list[Passage]]:
        """For each document what was retrieved from it."""
        found: list[list[Passage]] = [[] for _ in self.documents]
        for chunk in self.context.chunks:
            found[chunk.document].append(Passage(chunk.text, start=chunk.start))
        return found

    def _fitted(self, passages: Sequence[Sequence[Passage]]) -> Fitted:
        """The target's prompt."""

        def render(texts: Sequence[str]) -> list[Message]:
            read = [text for text in texts if text.strip()]
            return [*build_messages(SEPARATOR.join(read), self.question)]

        return fit_documents(
            self.documents,
            render,
            self.decoder.tokenizer,
            self.decoder.target.context_window,
            self._sampling.max_new_tokens,
            self._truncate,
            passages=passages,
            chat_template_kwargs=self._variables,
        )


class _Run(NamedTuple):
    """What a method hands to the decoder."""

    target: Prompt | None
    draft: Prompt | None
    omitted_tokens: int = 0
    exact: bool = False
    confidence: float = 1.0


def require_method(method: str) -> None:
    """Raises InvalidParameterError if there is no such method."""
    if method not in METHODS:
        raise InvalidParameterError(
            f"method={method!r} is unknown; choose one of {', '.join(METHODS)}"
        )


def _explained(
    chunks: Iterator[Chunk], skipped: str | None, omitted_tokens: int
) -> Iterator[Chunk]:
    for chunk in chunks:
        chunk.stats.draft_skipped = skipped or chunk.stats.draft_skipped
        chunk.stats.omitted_tokens = omitted_tokens
        yield chunk
