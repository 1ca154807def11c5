"""Statistics of a generation: token counts, times, acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

Method = Literal["rapid", "sd", "lc", "rag"]
Origin = Literal["lookup", "draft", "grammar", "target"]
"""Where a token came from: a lookup in the prompts, the drafter, a constraint that allowed no other
token, or the target itself."""

NOTHING_RETRIEVED = "the retriever returned nothing"
"""``Stats.draft_skipped`` where an external retriever found nothing for the drafter."""

NO_DRAFT_PROMPT = "no draft prompt was given"
"""``Stats.draft_skipped`` where the call had no draft prompt."""

NOTHING_PAID = "no draft was found that promised to save time"
"""``Stats.draft_skipped`` where ``gamma="auto"`` or a lookup drafted in no round."""


@dataclass
class Stats:
    """Counts and times of one generation.

    Attributes:
        method: method that ran: ``rapid`` (drafts, η > 0), ``sd`` (drafts, η = 0), ``lc`` (the
            target alone over its whole prompt, nothing drafted so far), or ``rag`` (the drafter
            alone over the retrieval context).
        prompt_tokens: number of tokens in the prompt that was answered.
        cached_tokens: number of those tokens whose KV was reused from an earlier call.
        cached_tokens_host: number of ``cached_tokens`` whose KV came from the host's memory to the
            device; 0 on a device that shares it.
        cached_tokens_disk: number of ``cached_tokens`` whose KV came from ``kv_cache_dir``.
        draft_prompt_tokens: number of tokens in the drafter's prompt; 0 without a drafter.
        max_new_tokens: limit of the answer in tokens: the requested one, or the room in the
            context window if that is less.
        completion_tokens: number of generated tokens, including an end-of-sequence token.
        rounds: number of verification passes of the target.
        drafted_tokens: number of tokens that the drafter proposed.
        accepted_tokens: number of proposed tokens that the target accepted.
        rejections: number of rounds in which a proposed token was rejected.
        draft_passes: number of forward passes of the drafter; less than ``drafted_tokens`` where
            it verified lookup guesses.
        prefill_seconds: wall time of reading the prompts and, the first time at a context length,
            of measuring the cost of passes.
        decode_seconds: wall time of all rounds.
        draft_seconds: part of ``decode_seconds`` spent drafting; on a GPU, where the host does not
            wait for drafts, the host's time only.
        mask_seconds: part of ``decode_seconds`` spent on the masks of a constraint; 0 without one.
        time_to_first_token: seconds from the call to the first round's tokens; None before that.
        draft_skipped: reason why nothing was drafted (method ``lc``) or retrieved; None otherwise.
        omitted_tokens: number of document tokens that ``truncate`` left out.
    """

    method: Method = "lc"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cached_tokens_host: int = 0
    cached_tokens_disk: int = 0
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
    mask_seconds: float = 0.0
    time_to_first_token: float | None = None
    draft_skipped: str | None = None
    omitted_tokens: int = 0

    @property
    def cached_tokens_device(self) -> int:
        """Number of ``cached_tokens`` whose KV was on the device."""
        return self.cached_tokens - self.cached_tokens_host - self.cached_tokens_disk

    @property
    def acceptance_ratio(self) -> float:
        """Accepted ÷ drafted tokens (the paper's "acceptance rate"); 0 without drafts."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Estimated probability that a drafted token is accepted, given that those before it were.

        This is a in the speed model; 0 without drafts.
        """
        judged = self.accepted_tokens + self.rejections
        return self.accepted_tokens / judged if judged else 0.0

    @property
    def tokens_per_round(self) -> float:
        """Generated tokens per verification pass of the target."""
        return self.completion_tokens / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: ``completion_tokens`` ÷ ``decode_seconds``, without the prefill."""
        return self.completion_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All counts, times and ratios by name, ready for JSON."""
        return asdict(self) | {
            "cached_tokens_device": self.cached_tokens_device,
            "acceptance_ratio": self.acceptance_ratio,
            "acceptance_rate": self.acceptance_rate,
            "tokens_per_round": self.tokens_per_round,
            "tokens_per_second": self.tokens_per_second,
        }

    @classmethod
    def together(cls, parts: Sequence[Stats]) -> Stats:
        """Sum the statistics of consecutive generations.

        Counts and seconds are added. The method is that of the first part with drafts,
        ``draft_skipped`` the first reason given; other fields are those of the first part.
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
