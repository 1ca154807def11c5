"""What a task is: items to ask, and a score for each answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from rapid_llm.errors import DataError

CONTEXT = "{context}"
"""Stands in an item's messages for the long context (for the drafter: what was retrieved)."""

ANSWER = "{answer}"
"""Stands in :attr:`Item.follow_up` where the first answer goes."""

SHORT_ANSWER = "Answer the question with a few words from the text above."
"""The instruction of tasks that have none of their own."""

MetricKind = Literal["rate", "mean"]
"""``rate``: 0 or 1 an item (Wilson interval); ``mean``: a number (bootstrap interval)."""

Message = dict[str, str]


@dataclass(frozen=True)
class Item:
    """One question on one long context.

    Attributes:
        id: unique within the task, and the same in every run.
        context: the whole long text; cut in its middle where the target's window is too small.
        query: what is retrieved for.
        messages: chat messages with ``{context}`` once in one of them.
        references: acceptable answers, at least one.
        max_new_tokens: of an answer, as the benchmark has it.
        follow_up: a second prompt (LongBench v2 with CoT): one user message with ``{answer}``,
            and ``{context}`` if it repeats the text; the answer to it is what is scored.
        follow_up_tokens: ``max_new_tokens`` of that second answer.
        groups: what the summary splits by, such as length or difficulty.
        meta: whatever else the task's scorer needs.
    """

    id: str
    context: str
    query: str
    messages: tuple[Message, ...]
    references: tuple[str, ...]
    max_new_tokens: int
    follow_up: str | None = None
    follow_up_tokens: int = 128
    groups: Mapping[str, str] = field(default_factory=dict)
    meta: Mapping[str, str] = field(default_factory=dict)


class Task(Protocol):
    """A list of items with their scorer.

    Attributes:
        name: as on the command line.
        metrics: the scores by name; the first is the task's headline.
        items: in a fixed order.
    """

    name: str
    metrics: Mapping[str, MetricKind]
    items: Sequence[Item]

    def score(self, item: Item, answer: str) -> dict[str, float]:
        """A number in [0, 1] for every metric."""
        ...


@dataclass
class Benchmark:
    """A :class:`Task`: its items, and a function that scores an answer.

    Raises:
        DataError: two items have the same id.
    """

    name: str
    metrics: Mapping[str, MetricKind]
    items: Sequence[Item]
    scorer: Callable[[Item, str], dict[str, float]]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for item in self.items:
            if item.id in seen:
                raise DataError(
                    f"the data of {self.name} holds the id {item.id!r} twice: give each item an "
                    "id of its own"
                )
            seen.add(item.id)

    def score(self, item: Item, answer: str) -> dict[str, float]:
        return self.scorer(item, answer)
