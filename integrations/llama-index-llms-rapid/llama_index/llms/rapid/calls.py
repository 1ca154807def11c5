"""One call of the decoder: its prompts and options, and its stream of LlamaIndex's responses."""

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
    """Arguments of the decoder, and values for the response that the decoder does not know.

    Attributes:
        decoder: the models.
        target: the target's prompt.
        draft: the drafter's prompt; None without one.
        options: options of the call.
        confidence: confidence of the retrieval, in [0, 1].
        draft_skipped: reason of the pipeline why there is no draft; None leaves it to the decoder.
        omitted_tokens: number of the documents' tokens that ``truncate`` left out.
        notes: entries of ``raw["rapid"]`` in addition to the statistics.
        reports: reports of the engines' answers that this call belongs to.
        reader: factory of readers of the answer.
        number: number of the call, unique in a report.
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
        """Stream a response per round; errors of the prompts are raised at once."""
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

    def _responses(self, deltas: Iterator[Delta]) -> Generator[Response, None, None]:
        reader = self.reader()
        with closing(cast(Any, deltas)):
            for delta in deltas:
                yield reader.push(delta, self._raw(delta))

    async def _aresponses(self, deltas: AsyncIterator[Delta]) -> AsyncGenerator[Response, None]:
        reader = self.reader()
        async with aclosing(cast(AsyncGenerator["Delta", None], deltas)):
            async for delta in deltas:
                yield reader.push(delta, self._raw(delta))

    def _raw(self, delta: Delta) -> dict[str, Any]:
        """``raw`` of the response after a delta."""
        stats = self._record(delta.stats)
        return {
            "usage": {
                "prompt_tokens": stats.prompt_tokens,
                "completion_tokens": stats.completion_tokens,
                "total_tokens": stats.prompt_tokens + stats.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
            },
            "finish_reason": delta.finish_reason,
            "rapid": summary([(stats, self.notes)]),
        }

    def _record(self, stats: Stats) -> Stats:
        """Complete the decoder's statistics, and record them in the reports."""
        stats = replace(
            stats,
            draft_skipped=self.draft_skipped or stats.draft_skipped,
            omitted_tokens=self.omitted_tokens,
        )
        for report in self.reports:
            report.record(self.number, stats, self.notes)
        return stats


def last_of(responses: Iterator[Response]) -> Response:
    """The last response of a stream, with the whole answer."""
    *_, last = responses
    return last.model_copy(update={"delta": None})


async def alast_of(responses: AsyncGenerator[Response, None]) -> Response:
    """:func:`last_of` for asyncio."""
    async with aclosing(responses):
        *_, last = [response async for response in responses]
    return last.model_copy(update={"delta": None})
