"""Filled prompt templates that remember their template, to be filled again with documents.

LlamaIndex fills a prompt template with the retrieved text and passes on the result. The target
needs the same template filled with the documents, so the result remembers its template. To all
else, callbacks and traces included, it is the list of messages or the text that it always was;
neither shows the documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import BasePromptTemplate

from llama_index.llms.rapid.grounding import Retrieved
from llama_index.llms.rapid.statistics import Report
from rapid_llm.errors import RapidError


class PipelineError(RapidError, RuntimeError):
    """A call that an engine made of the LLM failed; ``__cause__`` is the error itself.

    LlamaIndex's compact and refine modes take a ``ValueError``, as most of ours are, for a
    malformed answer, and return "Empty Response". This error is no ``ValueError``, so it arrives.
    """


class Context(str):
    """The retrieved text, with the documents that it is from.

    Attributes:
        retrieved: the passages and the documents.
        report: filled while the model answers, with ``raw["rapid"]`` of the response.
    """

    retrieved: Retrieved
    report: Report

    def __new__(cls, retrieved: Retrieved) -> Context:
        self = super().__new__(cls, retrieved.grounding.draft)
        self.retrieved, self.report = retrieved, Report()
        return self


class FilledMessages(list[ChatMessage]):
    """Messages from a template.

    Attributes:
        fill: the messages with other text in the place of the retrieved text.
        context: the retrieved text; None if the template shows none.
    """

    def __init__(
        self, fill: Callable[[str], Sequence[ChatMessage]], context: str | None = None
    ) -> None:
        super().__init__(fill(context or ""))
        self.fill, self.context = fill, context


class FilledPrompt(str):
    """Text from a template; attributes as in :class:`FilledMessages`."""

    fill: Callable[[str], str]
    context: str | None

    def __new__(cls, fill: Callable[[str], str], context: str | None = None) -> FilledPrompt:
        self = super().__new__(cls, fill(context or ""))
        self.fill, self.context = fill, context
        return self


def refillable(
    fill: Callable[..., Any],
    prompt: BasePromptTemplate,
    prompt_args: dict[str, Any],
    has_documents: bool,
) -> tuple[Callable[[str], Any], str | None]:
    """How to fill a template with other text, and the retrieved text that it shows now.

    Every response synthesizer passes the retrieved text as ``context_str`` (``context_msg`` when
    refining) to a template that already has its ``query_str``. Other calls (rerankers, metadata
    extractors) pass both at once, or no question: they keep their text.

    Args:
        fill: makes the prompt from the template and its arguments.
        prompt: the template.
        prompt_args: its arguments.
        has_documents: whether there are documents to take the place of plain retrieved text; a
            :class:`Context` brings its own.
    """
    for name in ("context_str", "context_msg"):
        value = prompt_args.get(name)
        if isinstance(value, list):  # simple_summarize passes a list of one text
            value = "\n\n".join(map(str, value))
        if isinstance(value, Context) or (
            isinstance(value, str) and has_documents and "query_str" in prompt.kwargs
        ):
            return partial(_refill, fill, prompt, prompt_args, name), value
    return lambda _: fill(prompt, **prompt_args), None


def _refill(
    fill: Callable[..., Any],
    prompt: BasePromptTemplate,
    prompt_args: dict[str, Any],
    name: str,
    text: str,
) -> Any:
    return fill(prompt, **{**prompt_args, name: text})


@contextmanager
def not_swallowed(prompt: object) -> Iterator[None]:
    """Raise a :class:`PipelineError` for what LlamaIndex would take for a malformed answer."""
    try:
        yield
    except (ValueError, TypeError) as error:
        # RapidSynthesizer, where a Context is from, lets errors pass.
        if isinstance(prompt, FilledMessages | FilledPrompt) and not isinstance(
            prompt.context, Context
        ):
            raise PipelineError(str(error)) from error
        raise
