"""Interactive conversation about documents: questions typed at a terminal."""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from rapid_llm.cli.answers import Job, note_unread, printed, unread
from rapid_llm.cli.flags import with_flags
from rapid_llm.cli.ranks import read_once
from rapid_llm.console import Bars, show
from rapid_llm.errors import ContextWindowError, MissingDependencyError, ModelError, RapidError
from rapid_llm.stats import Method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rapid_llm.answers import Answer
    from rapid_llm.pipeline import Conversation, RapidPipeline

_PROMPT = "> "


def converse(pipeline: RapidPipeline, documents: Sequence[str], method: Method, bars: Bars) -> None:
    """Answer typed questions until an empty line or the end of input.

    A question sees the earlier ones and their answers, of which the oldest are dropped when the
    context window is full. An interrupt stops an answer, and its question is not recorded.

    Args:
        pipeline: the documents and models.
        documents: names of the documents.
        method: method of all answers.
        bars: progress bars.

    Raises:
        ModelError, MissingDependencyError: no question can be answered.
        KeyboardInterrupt: an interrupt while no answer was under way.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  (input() then edits its line, and knows earlier ones)
    show(
        "Ask about the documents. An empty line or Ctrl-D ends, Ctrl-C stops an answer.",
        stderr=True,
    )
    conversation = pipeline.chat(method)
    while question := read_once(_typed):
        answer = _answered(conversation, question, bars)
        if answer is not None and not unread(answer.stats):
            show(Job(pipeline, question, documents, bars).summary(method, answer), stderr=True)


def _typed() -> str:
    """A line of standard input, empty at its end; the prompt goes to stderr if stdout is a file."""
    prompt = _PROMPT if sys.stdout.isatty() else ""
    if not prompt:
        print(_PROMPT, end="", file=sys.stderr, flush=True)
    try:
        return input(prompt).strip()
    except EOFError:
        show("", stderr=True)
        return ""


def _answered(conversation: Conversation, question: str, bars: Bars) -> Answer | None:
    """Print the answer as it arrives and return it; None if it failed or was stopped."""
    before = list(conversation.messages)
    try:
        answer = _with_room(conversation, question, bars)
    except KeyboardInterrupt:
        show("\nStopped; this question is not remembered.", stderr=True)
    except (MissingDependencyError, ModelError):
        raise
    except RapidError as error:
        show(f"\nError: {with_flags(str(error))}", stderr=True)
    else:
        note_unread(answer.stats)
        if unread(answer.stats):
            conversation.messages = before  # there is no answer to follow up
        return answer
    conversation.messages = before
    return None


def _with_room(conversation: Conversation, question: str, bars: Bars) -> Answer:
    """Answer with as much of the conversation as fits into the context window."""
    forgotten = 0
    while True:
        try:
            with closing(conversation.stream(question, progress=bars)) as stream:
                answer = stream.answer(printed(stream, bars))
            break
        except ContextWindowError:
            if not conversation.messages:
                raise
            del conversation.messages[:2]
            forgotten += 1
    if forgotten:
        what = "question is" if forgotten == 1 else f"{forgotten} questions are"
        show(f"The context window is full: the oldest {what} forgotten.", stderr=True)
    return answer
