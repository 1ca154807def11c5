"""Base class of decoders: ``generate``, ``stream`` and ``astream``, and their arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

from rapid_llm.aio import iterate_with_progress
from rapid_llm.arguments import arguments_of
from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.progress import PromptProgress
from rapid_llm.results import Delta, GenerationResult, results_of

if TYPE_CHECKING:
    from rapid_llm.encoding import Prompt


@dataclass(frozen=True)
class GenerationRequest:
    """Arguments of one call of :meth:`.RapidDecoder.stream`, which describes them.

    Many of them are answered at once by :meth:`Decoder.generate_many`.
    """

    target_prompt: Prompt | None
    draft_prompt: Prompt | None = None
    _: KW_ONLY
    sampling: SamplingParams | None = None
    speculation: SpeculationConfig | None = None
    confidence: float = 1.0
    progress: PromptProgress | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    @property
    def prompts(self) -> tuple[Prompt | None, Prompt | None]:
        """The positional arguments of the call."""
        return self.target_prompt, self.draft_prompt

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the call by name."""
        given = vars(self).items()
        return {name: value for name, value in given if not name.endswith("_prompt")}


class Decoder(ABC):
    """What answers prompts: models of this process, their scheduler, or models of a server."""

    def __copy__(self) -> Decoder:
        return self

    def __deepcopy__(self, memo: object) -> Decoder:
        """The decoder itself: a copy would share the models."""
        return self

    @arguments_of(GenerationRequest)
    def generate(self, request: GenerationRequest) -> GenerationResult:
        """Answer a prompt; arguments and errors are those of :meth:`stream`."""
        deltas: Any = self.stream(*request.prompts, **request.options)
        with closing(deltas):
            return GenerationResult.from_deltas(list(deltas))

    @abstractmethod
    @arguments_of(GenerationRequest)
    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        """Answer a prompt and yield one delta per round, see :meth:`.RapidDecoder.stream`.

        The iterator has a method ``close``.
        """

    @arguments_of(GenerationRequest)
    def astream(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """:meth:`stream` for asyncio, in a thread that does not block the event loop.

        Cancelling the task or closing the iterator stops the generation after the current round or
        chunk of the prefill. ``progress`` is called in that thread.
        """
        return iterate_with_progress(
            lambda report: self.stream(*request.prompts, **request.options | {"progress": report}),
            request.progress,
        )

    @overload
    def generate_many(self, requests: Iterable[GenerationRequest]) -> list[GenerationResult]: ...

    @overload
    def generate_many(
        self, requests: Iterable[GenerationRequest], *, return_exceptions: Literal[True]
    ) -> list[GenerationResult | Exception]: ...

    def generate_many(
        self, requests: Iterable[GenerationRequest], *, return_exceptions: bool = False
    ) -> list[Any]:
        """Answer many requests at once, at most ``max_sequences`` of them.

        Their passes are joined, and a document that several share is read and held once, see
        :class:`rapid_llm.batching.Scheduler`. Answers have the law of single calls, and the same
        tokens but for rounding.

        Args:
            requests: arguments of :meth:`stream`, one object a request.
            return_exceptions: whether a request that failed has its error in the place of a result,
                and the others go on. Otherwise the first error is raised, and the others stop.

        Returns:
            One result a request, in their order.

        Raises:
            RapidError: any error of :meth:`stream`.
        """
        asked = list(requests)
        return results_of(len(asked), self._stream_many(asked, return_exceptions))

    @overload
    def stream_many(self, requests: Iterable[GenerationRequest]) -> Iterator[tuple[int, Delta]]: ...

    @overload
    def stream_many(
        self, requests: Iterable[GenerationRequest], *, return_exceptions: Literal[True]
    ) -> Iterator[tuple[int, Delta | Exception]]: ...

    def stream_many(
        self, requests: Iterable[GenerationRequest], *, return_exceptions: bool = False
    ) -> Iterator[Any]:
        """:meth:`generate_many` as a stream of (index of the request, delta), as they come.

        Closing it cancels all requests.
        """
        return self._stream_many(list(requests), return_exceptions)

    @abstractmethod
    def _stream_many(
        self, requests: Sequence[GenerationRequest], return_exceptions: bool
    ) -> Iterator[tuple[int, Delta | Exception]]:
        """The deltas of requests, and with ``return_exceptions`` their errors, as they come."""
