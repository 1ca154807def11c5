"""What one generation cost and what speculation brought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

Method = Literal["rapid", "sd", "lc", "rag"]

NOTHING_RETRIEVED = "the retriever returned nothing"
"""``Stats.draft_skipped`` where a pipeline's own retriever left the drafter without a context."""

NO_DRAFT_PROMPT = "no draft prompt was given"
"""The same where the target was asked alone."""

NOTHING_PAID = "no draft was found that promised to save time"
"""The same where ``gamma="auto"`` or a lookup drafted in no round."""


@dataclass
class Stats:
    """Counts and seconds of one generation.

    Attributes:
        method: what happened: ``rapid`` (drafts, η > 0), ``sd`` (drafts, η = 0), ``lc`` (nothing
            was drafted so far: the target alone over its whole prompt), or ``rag`` (the drafter
            alone over the retrieval context).
        prompt_tokens: tokens of the target's prompt.
        cached_tokens: of these, those whose KV was kept from an earlier call and not read again.
        draft_prompt_tokens: tokens of the drafter's prompt; 0 without a draft.
        max_new_tokens: tokens the answer could have at most: what was asked for, or what the
            context window had left.
        completion_tokens: tokens generated, an end-of-sequence token included.
        rounds: verification passes of the target.
        drafted_tokens: tokens the drafter proposed.
        accepted_tokens: proposed tokens that the target accepted.
        rejections: rounds in which a proposed token was rejected.
        draft_passes: forward passes of the drafter; fewer than ``drafted_tokens`` where it checked
            guesses.
        prefill_seconds: wall time of reading the prompts and, the first time at a context length,
            of measuring what passes cost there.
        decode_seconds: wall time of the rounds that followed.
        draft_seconds: of these, spent drafting; on a GPU, where drafts are launched and not waited
            for, what the host spent.
        time_to_first_token: seconds from the call to the first round's tokens; None before it.
        draft_skipped: where the method is ``lc``, why nothing was drafted; where nothing was
            retrieved, why that is; else None.
        omitted_tokens: tokens of the documents that ``truncate`` left out.
    """

    method: Method = "lc"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    draft_prompt_tokens: int = 0
    max_new_tokens: int = 0
    completion_tokens: int = 0
    rounds: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    rejections: int = 0
    draft_passes: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    draft_seconds: float = 0.0
    time_to_first_token: float | None = None
    draft_skipped: str | None = None
    omitted_tokens: int = 0

    @property
    def acceptance_ratio(self) -> float:
        """Accepted ÷ drafted tokens (the paper's "acceptance rate"); 0 if none was drafted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def acceptance_rate(self) -> float:
        """a: how likely a drafted token is accepted once those before it were; 0 if none was
        drafted."""
        judged = self.accepted_tokens + self.rejections
        return self.accepted_tokens / judged if judged else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Tokens kept per verification pass of the target."""
        return self.completion_tokens / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: completion tokens ÷ ``decode_seconds`` (prefill left out)."""
        return self.completion_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Every count, second and ratio under its name, ready for JSON."""
        return asdict(self) | {
            "acceptance_ratio": self.acceptance_ratio,
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_round": self.tokens_per_round,
            "tokens_per_second": self.tokens_per_second,
        }

    @classmethod
    def together(cls, parts: Sequence[Stats]) -> Stats:
        """Of several generations, one after the other: counts and seconds add up.

        The method is the first one that drafted, ``draft_skipped`` the first reason that there is;
        what else cannot be added is the first's.
        """
        totals = {
            field.name: sum(getattr(part, field.name) for part in parts)
            for field in fields(cls)
            if isinstance(field.default, int | float)
        }
        reasons = (part.draft_skipped for part in parts)
        return replace(
            parts[0],
            **totals,
            method=next((p.method for p in parts if p.drafted_tokens), parts[0].method),
            draft_skipped=next((r for r in reasons if r is not None), None),
        )
