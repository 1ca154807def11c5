"""What goes to the decoder for one call, and the responses that come of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from typing import Any, cast

from llama_index.core.base.llms.types import (
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
)

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import Chunk
from rapid_llm.encoding import Prompt


@dataclass(frozen=True)
class Options:
    """How to generate: what a call's flat options are sorted into."""

    sampling: SamplingParams
    speculation: SpeculationConfig
    chat_template_kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """What goes to the decoder, and what goes into the response beside its answer.

    Attributes:
        target: the target's prompt.
        draft: the drafter's; None without one.
        options: how to generate.
        notes: added to ``raw["rapid"]``; a reason for having no draft goes before the decoder's.
        report: gets what ``raw["rapid"]`` gets.
    """

    target: Prompt
    draft: Prompt | None
    options: Options
    notes: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the decoder's ``stream`` and ``astream``."""
        return {
            "sampling": self.options.sampling,
            "speculation": self.options.speculation,
            "chat_template_kwargs": self.options.chat_template_kwargs,
        }

    def responses(self, chunks: Iterator[Chunk]) -> CompletionResponseGen:
        """A response a chunk."""
        text = ""
        with closing(cast(Any, chunks)):
            for chunk in chunks:
                text += chunk.text
                yield self._response(text, chunk)

    async def aresponses(self, chunks: AsyncIterator[Chunk]) -> CompletionResponseAsyncGen:
        """A response a chunk."""
        text = ""
        async with aclosing(cast(AsyncGenerator[Chunk, None], chunks)):
            async for chunk in chunks:
                text += chunk.text
                yield self._response(text, chunk)

    def _response(self, text: str, chunk: Chunk) -> CompletionResponse:
        """The answer so far, after a chunk."""
        stats = chunk.stats
        self.report.update(stats.as_dict() | self.notes)
        self.report["draft_skipped"] = self.notes.get("draft_skipped") or stats.draft_skipped
        return CompletionResponse(
            text=text,
            delta=chunk.text,
            raw={
                "usage": {
                    "prompt_tokens": stats.prompt_tokens,
                    "completion_tokens": stats.completion_tokens,
                    "total_tokens": stats.prompt_tokens + stats.completion_tokens,
                    "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
                },
                "finish_reason": chunk.finish_reason,
                "rapid": dict(self.report),
            },
        )


def last_of(responses: CompletionResponseGen) -> CompletionResponse:
    """The whole answer."""
    *_, last = responses
    return last.model_copy(update={"delta": None})


async def alast_of(responses: CompletionResponseAsyncGen) -> CompletionResponse:
    """The whole answer."""
    async with aclosing(responses):
        *_, last = [response async for response in responses]
    return last.model_copy(update={"delta": None})
