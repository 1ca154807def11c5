"""Base classes of tasks: items to ask, and a score for each answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.errors import DataError
from rapid_llm.evaluation.judge import Judge

# Stand in an item's messages for its context (the drafter's: what was retrieved), and in its
# follow-up for the first answer.
CONTEXT, ANSWER = "{context}", "{answer}"

SHORT_ANSWER = "Answer the question with a few words from the text above."
"""The instruction of tasks that have none of their own."""

MetricKind = Literal["rate", "mean"]
"""``rate``: 0 or 1 an item (Wilson interval); ``mean``: a number (bootstrap interval)."""

Message = dict[str, str]


@dataclass(frozen=True)
class Item:
    """One question on one long context."""

    id: str  # unique within the task, and the same in every run
    context: str  # whole; cut in its middle where the target's window is too small
    query: str  # what is retrieved for
    messages: tuple[Message, ...]  # with {context} once in one of them
    references: tuple[str, ...]  # acceptable answers, at least one
    max_new_tokens: int  # of an answer, as the benchmark has it
    # A second user message with {answer}, and {context} if it repeats the text (LongBench v2 with
    # CoT): the answer to it is what is scored.
    follow_up: str | None = None
    follow_up_tokens: int = 128
    groups: Mapping[str, str] = field(default_factory=dict)  # such as length or difficulty
    meta: Mapping[str, str] = field(default_factory=dict)  # what else the scorer needs


@dataclass
class Task:
    """Items with their scorer.

    Raises:
        DataError: two items have the same id.
    """

    name: str  # as on the command line
    metrics: Mapping[str, MetricKind]  # of the scores; the first is the task's headline
    items: Sequence[Item]
    score: Callable[[Item, str], dict[str, float]]  # in [0, 1] for every metric

    def __post_init__(self) -> None:
        (most, times), *_ = Counter(item.id for item in self.items).most_common(1) or [("", 0)]
        if times > 1:
            raise DataError(
                f"the data of {self.name} holds the id {most!r} twice: give each item its own"
            )


@dataclass(frozen=True)
class Source:
    """What the items of a task are made from."""

    tokenizer: PreTrainedTokenizerBase  # the target's fast tokenizer
    # The benchmark's file, or the folder with it; None downloads it where the hub has it (∞Bench,
    # LongBench v2). needle takes any text.
    data: Path | None = None
    context_tokens: int | None = None  # of contexts made to a length; None is the task's own
    limit: int | None = None  # number of items; None takes all (of needle, 100)
    seed: int = 0  # of what is drawn at random
    judge: Judge | None = None  # of mtbench101's answers
