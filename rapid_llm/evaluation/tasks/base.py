"""Base classes of tasks: items to ask, and a score for each answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.context.prompts import build_messages
from rapid_llm.errors import DataError
from rapid_llm.evaluation.judge import Judge
from rapid_llm.folders import packaged_text

# Placeholders for the context (of the drafter: the retrieved text) in an item's messages, and for
# the first answer in its follow-up.
CONTEXT, ANSWER = "{context}", "{answer}"

_SHORT_ANSWER = "Answer the question with a few words from the text above."
_PROMPTS: dict[str, str] = json.loads(packaged_text("prompts.json"))

DEPTHS = ("0–20 %", "20–40 %", "40–60 %", "60–80 %", "80–100 %")
"""Groups of the depth at which the answer stands in the context."""

Metrics = Mapping[str, Literal["rate", "mean"]]
"""Scores of a task, the headline first: ``rate``, 0 or 1 per item (Wilson interval), or ``mean``, a
number (bootstrap interval)."""

Message = dict[str, str]


@dataclass(frozen=True)
class Item:
    """One question on one long context."""

    id: str  # id that is unique within the task, and the same in every run
    context: str  # whole context; its middle is cut where the target's window is too small
    query: str  # text to retrieve for
    messages: tuple[Message, ...]  # prompt, with {context} once in one of the messages
    references: tuple[str, ...]  # acceptable answers, at least one
    max_new_tokens: int  # maximum length of an answer in tokens, as in the benchmark
    # Second user message with {answer}, and {context} if it repeats the text (LongBench v2 with
    # CoT); the answer to it is scored.
    follow_up: str | None = None
    follow_up_tokens: int = 128
    groups: Mapping[str, str] = field(default_factory=dict)  # groups, such as length or difficulty
    meta: Mapping[str, str] = field(default_factory=dict)  # other values for the scorer


@dataclass
class Task:
    """Items with their scorer.

    Raises:
        DataError: two items have the same id.
    """

    name: str  # name on the command line
    metrics: Metrics
    items: Sequence[Item]
    score: Callable[[Item, str], dict[str, float]]  # scores of an answer in [0, 1], by metric

    def __post_init__(self) -> None:
        (most, times), *_ = Counter(item.id for item in self.items).most_common(1) or [("", 0)]
        if times > 1:
            raise DataError(
                f"the data of {self.name} holds the id {most!r} twice: give each item its own"
            )


@dataclass(frozen=True)
class Source:
    """Data and options from which the items of a task are made."""

    tokenizer: PreTrainedTokenizerBase  # the target's fast tokenizer
    # File of the benchmark, or the folder with it; None downloads it where the hub has it (∞Bench,
    # LongBench v2). needle takes any text.
    data: Path | None = None
    context_tokens: int | None = None  # length of contexts that are made; None for the default
    limit: int | None = None  # number of items; None for all (needle: 100)
    seed: int = 0  # seed of all draws
    judge: Judge | None = None  # judge of mtbench101's answers


def prompt(name: str, asked: str) -> str:
    """The benchmark's own prompt for a question, with ``{context}``."""
    return _PROMPTS[name].replace("{asked}", asked)


def brief(question: str) -> tuple[Message, ...]:
    """Messages that ask for a few words, for tasks without a prompt of their own."""
    return tuple(build_messages(CONTEXT, question, instruction=_SHORT_ANSWER))


def depth_group(depth: float) -> str:
    """Name of the fifth of a context that a depth from 0 (its beginning) to 1 is in."""
    return DEPTHS[min(int(depth * len(DEPTHS)), len(DEPTHS) - 1)]
