"""What an answer says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from rapid_llm.stats import NOTHING_RETRIEVED

if TYPE_CHECKING:
    from rapid_llm.decoder import Chunk
    from rapid_llm.stats import Stats

    from langchain_rapid.settings import Call


def usage(stats: Stats) -> UsageMetadata:
    """The target's tokens. The drafter's prompt is in ``response_metadata["rapid"]``."""
    return UsageMetadata(
        input_tokens=stats.prompt_tokens,
        output_tokens=stats.completion_tokens,
        total_tokens=stats.prompt_tokens + stats.completion_tokens,
        input_token_details=InputTokenDetails(cache_read=stats.cached_tokens),
    )


def response_metadata(chunk: Chunk, call: Call) -> dict[str, Any]:
    """What a finished answer says of itself; ``chunk`` is its last."""
    stats = chunk.stats
    return {
        "model_name": call.model,
        "finish_reason": chunk.finish_reason,
        "rapid": {
            "method": stats.method,
            "drafted": stats.drafted_tokens,
            "accepted": stats.accepted_tokens,
            "acceptance_ratio": stats.acceptance_ratio,
            "rounds": stats.rounds,
            "tokens_per_round": stats.tokens_per_round,
            "draft_prompt_tokens": stats.draft_prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "max_tokens": stats.max_new_tokens,
            "omitted_tokens": stats.omitted_tokens,
            "prefill_seconds": stats.prefill_seconds,
            "decode_seconds": stats.decode_seconds,
            "draft_skipped": NOTHING_RETRIEVED if call.retrieved == [] else stats.draft_skipped,
            "chunks": call.retrieved or [],
        },
    }
