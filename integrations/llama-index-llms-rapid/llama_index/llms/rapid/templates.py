"""Filled prompt templates that remember their template, to be filled again with documents.

LlamaIndex fills a prompt template with the retrieved text and passes on the result. The target
needs the same template filled with the documents, so the result remembers its template. For all
other code, such as callbacks and traces, it is a plain list of messages or text, without the
documents.
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
    """An engine's call of the LLM failed; ``__cause__`` is the original error.

    LlamaIndex's compact and refine modes treat a ``ValueError``, as most of our errors are, as a
    malformed answer and return "Empty Response". This error is not a ``ValueError``, so that users
    see it.
    """


class Context(str):
    """The retrieved text, with the documents that it is from.

    Attributes:
        retrieved: contexts of both models.
        report: statistics of the answer, filled while the model answers.
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
        fill: function from a text to the messages with it in the place of the retrieved text.
        context: retrieved text; None if the template shows none.
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
    """A function that fills a template with another text, and the retrieved text in it now.

    Every response synthesizer passes the retrieved text as ``context_str`` (``context_msg`` when
    refining) to a template that already has its ``query_str``. Other calls (rerankers, metadata
    extractors) pass both at once, or no question, and are filled with their own text only.

    Args:
        fill: function from the template and its arguments to the prompt.
        prompt: the template.
        prompt_args: arguments of the template.
        has_documents: whether documents can replace plain retrieved text; a :class:`Context` has
            its own.
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
    """Raise a :class:`PipelineError` for errors that LlamaIndex treats as malformed answers."""
    try:
        yield
    except (ValueError, TypeError) as error:
        # RapidSynthesizer, which makes Contexts, does not swallow errors.
        if isinstance(prompt, FilledMessages | FilledPrompt) and not isinstance(
            prompt.context, Context
        ):
            raise PipelineError(str(error)) from error
        raise
