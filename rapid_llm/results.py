"""What a generation gives: the deltas of a stream, and the whole answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rapid_llm.old_names import OldName
from rapid_llm.stats import Origin, Stats

FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True)
class Delta:
    """The part of an answer that one round added.

    Attributes:
        text: new text that will not change; empty while a character or a stop string may still be
            incomplete.
        token_ids: ids of the round's tokens.
        finish_reason: None but on the last delta: ``stop`` (an end-of-sequence token of the model
            or the tokenizer, the chat template's end of a turn, or a stop string) or ``length``
            (``max_new_tokens`` reached).
        stats: totals so far, complete on the last delta.
        origins: where each of the tokens came from.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stats: Stats
    origins: tuple[Origin, ...] = ()


@dataclass(frozen=True)
class GenerationResult:
    """A finished answer.

    Attributes:
        text: the answer without special tokens, cut before a stop string.
        token_ids: ids of all generated tokens, including the token that ended the answer.
        finish_reason: ``stop`` or ``length``, see :class:`Delta`.
        stats: counts and times of the generation.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats

    from_chunks = OldName("from_deltas")

    @classmethod
    def from_deltas(cls, deltas: Sequence[Delta]) -> GenerationResult:
        """Join all deltas of a finished stream."""
        last = deltas[-1]
        assert last.finish_reason is not None
        return cls(
            text="".join(delta.text for delta in deltas),
            token_ids=[token for delta in deltas for token in delta.token_ids],
            finish_reason=last.finish_reason,
            stats=last.stats,
        )


def results_of(
    requests: int, outcomes: Iterable[tuple[int, Delta | Exception]]
) -> list[GenerationResult | Exception]:
    """Results of requests from their deltas, in the order of the requests.

    Args:
        requests: number of requests.
        outcomes: (index of the request, delta or error), as they come; an error is the result.
    """
    deltas: list[list[Delta]] = [[] for _ in range(requests)]
    errors: dict[int, Exception] = {}
    for index, outcome in outcomes:
        if isinstance(outcome, Delta):
            deltas[index].append(outcome)
        else:
            errors[index] = outcome
    return [
        errors[index] if index in errors else GenerationResult.from_deltas(each)
        for index, each in enumerate(deltas)
    ]
