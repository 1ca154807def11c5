"""One call of the decoder: its prompts and options, and its responses as LlamaIndex's."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import aclosing, closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Generic, cast

from llama_index.llms.rapid.answers import Reader, Response, TextReader
from llama_index.llms.rapid.fields import Options
from llama_index.llms.rapid.statistics import Report, summary
from rapid_llm.stats import Stats

if TYPE_CHECKING:
    from rapid_llm.decoder import Delta, RapidDecoder
    from rapid_llm.encoding import Prompt


_numbers = count()


@dataclass(frozen=True)
class Call(Generic[Response]):
    """What goes to the decoder, and what goes into the response beside its answer.

    Attributes:
        decoder: the models.
        target: the target's prompt.
        draft: the drafter's; None without one.
        options: how to generate.
        confidence: of the retrieval, in [0, 1].
        draft_skipped: why there is no draft, where the pipeline knows; else the decoder says it.
        omitted_tokens: tokens of the documents that ``truncate`` left out.
        notes: what ``raw["rapid"]`` shows beside the statistics.
        reports: of the engines' answers that this call belongs to.
        reader: makes what reads the answer.
        number: tells it from other calls in a report.
    """

    decoder: RapidDecoder
    target: Prompt
    draft: Prompt | None
    options: Options
    confidence: float = 1.0
    draft_skipped: str | None = None
    omitted_tokens: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)
    reports: tuple[Report, ...] = ()
    reader: Callable[[], Reader[Response]] = cast(Any, TextReader)  # noqa: RUF009
    number: int = field(default_factory=partial(next, _numbers))

    def stream(self) -> Generator[Response, None, None]:
        """A response a round. Errors of the prompts do not wait for the first one."""
        self._record(Stats())
        return self._responses(self.decoder.stream(self.target, self.draft, **self._arguments))

    def astream(self) -> AsyncGenerator[Response, None]:
        """:meth:`stream` for asyncio; calls that are awaited together are answered at once."""
        self._record(Stats())
        stream = self.decoder.scheduler.astream(self.target, self.draft, **self._arguments)
        return self._aresponses(stream)

    @property
    def _arguments(self) -> dict[str, Any]:
        return {
            "sampling": self.options.sampling,
            "speculation": self.options.speculation,
            "confidence": self.confidence,
            "chat_template_kwargs": self.options.engine.chat_template_kwargs,
        }

    def _responses(self, chunks: Iterator[Delta]) -> Generator[Response, None, None]:
        reader = self.reader()
        with closing(cast(Any, chunks)):
            for chunk in chunks:
                yield reader.push(chunk, self._raw(chunk))

    async def _aresponses(self, chunks: AsyncIterator[Delta]) -> AsyncGenerator[Response, None]:
        reader = self.reader()
        async with aclosing(cast(AsyncGenerator["Delta", None], chunks)):
            async for chunk in chunks:
                yield reader.push(chunk, self._raw(chunk))

    def _raw(self, chunk: Delta) -> dict[str, Any]:
        """What the response after a chunk says of itself."""
        stats = self._record(chunk.stats)
        return {
            "usage": {
                "prompt_tokens": stats.prompt_tokens,
                "completion_tokens": stats.completion_tokens,
                "total_tokens": stats.prompt_tokens + stats.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
            },
            "finish_reason": chunk.finish_reason,
            "rapid": summary([(stats, self.notes)]),
        }

    def _record(self, stats: Stats) -> Stats:
        """The decoder's statistics with what the pipeline knows, put into the reports."""
        stats = replace(
            stats,
            draft_skipped=self.draft_skipped or stats.draft_skipped,
            omitted_tokens=self.omitted_tokens,
        )
        for report in self.reports:
            report.record(self.number, stats, self.notes)
        return stats


def last_of(responses: Iterator[Response]) -> Response:
    """The whole answer."""
    *_, last = responses
    return last.model_copy(update={"delta": None})


async def alast_of(responses: AsyncGenerator[Response, None]) -> Response:
    """The whole answer."""
    async with aclosing(responses):
        *_, last = [response async for response in responses]
    return last.model_copy(update={"delta": None})
