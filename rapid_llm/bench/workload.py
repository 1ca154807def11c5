"""Prompts for the bench: two tasks on one document of a given length."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.encoding import encode_literal, encode_prompt
from rapid_llm.errors import InvalidParameterError

QUOTED = "PROPHECY"
QUESTIONS = {
    "quoting": f"Quote the definition of {QUOTED}.",
    "free": "Summarise the text: what is it about?",
}
RETRIEVED_TOKENS = 512
_LEAST_DOCUMENT = 128


@dataclass(frozen=True)
class Workload:
    """The prompts of one question."""

    task: str  # name of the task
    context: int  # requested tokens of the target's prompt
    target: list[int]  # ids of the target's prompt
    draft: list[int]  # ids of the drafter's prompt: a part of the document, and the question


def make_workload(
    task: str, context: int, text: str, tokenizer: PreTrainedTokenizerBase
) -> Workload:
    """Cut or repeat a text so that the target's prompt on a task has ``context`` tokens.

    Documents are cut around the entry that is to be quoted. The drafter's part, which needs no
    retriever, is cut around it too; for the free task it is the document's beginning.

    Raises:
        InvalidParameterError: ``context`` leaves no room for a document.
    """
    question = QUESTIONS[task]
    # The longest question's, so that all tasks of one context share their document.
    frame = max(len(_prompt("x", asked, tokenizer)) for asked in QUESTIONS.values())
    room = context - frame
    if room < _LEAST_DOCUMENT:
        raise InvalidParameterError(
            f"context={context} leaves {max(room, 0)} tokens for the document; give at least "
            f"{frame + _LEAST_DOCUMENT}"
        )
    ids = encode_literal(text, tokenizer)
    before = len(encode_literal(text[: text.index(QUOTED)], tokenizer))
    start = max(0, min(before - room // 2, len(ids) - room))
    first = start + max(0, before - start - RETRIEVED_TOKENS // 2) * (task == "quoting")
    ends = (start, start + room), (first, min(first + RETRIEVED_TOKENS, start + room))
    texts = (tokenizer.decode(list(islice(cycle(ids), *some))) for some in ends)
    return Workload(task, context, *(_prompt(text, question, tokenizer) for text in texts))


def _prompt(text: str, question: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return encode_prompt([{"role": "user", "content": f"{text}\n\n{question}"}], tokenizer)
