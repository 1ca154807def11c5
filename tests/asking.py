"""One question to a pipeline, for tests that ask it by several methods."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rapid_llm.context import ContextBuilder, RetrievalContext
from rapid_llm.decoder import RapidDecoder
from rapid_llm.pipeline import Answer, RapidPipeline


class Asked:
    """One question to a pipeline, by any method."""

    def __init__(
        self,
        decoder: RapidDecoder,
        builder: ContextBuilder | None,
        documents: Any,
        question: str,
        *,
        progress: Any = None,
        chat_template_kwargs: Any = None,
        **options: Any,
    ) -> None:
        self.pipeline = RapidPipeline(decoder, documents, builder=builder, **options)
        self._question = question
        self._call = {"progress": progress, "chat_template_kwargs": chat_template_kwargs}

    @property
    def context(self) -> RetrievalContext:
        return self.pipeline.retrieve(self._question)

    def answer(self, method: Any = "rapid") -> Answer:
        return self.pipeline.ask(self._question, method, **self._call)

    def stream(self, method: Any = "rapid") -> Iterator[Any]:
        return self.pipeline.stream(self._question, method, **self._call)
