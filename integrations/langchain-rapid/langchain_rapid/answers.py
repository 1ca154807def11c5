"""Usage and response metadata of an answer, in LangChain's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import LLMResult
from rapid_llm.stats import NOTHING_RETRIEVED

if TYPE_CHECKING:
    from rapid_llm.decoder import Delta
    from rapid_llm.stats import Stats
    from rapid_llm.tools.answers import ChatDelta

    from langchain_rapid.options import Call


def usage(stats: Stats) -> UsageMetadata:
    """Token counts of the target, in LangChain's form."""
    return UsageMetadata(
        input_tokens=stats.prompt_tokens,
        output_tokens=stats.completion_tokens,
        total_tokens=stats.prompt_tokens + stats.completion_tokens,
        input_token_details=InputTokenDetails(cache_read=stats.cached_tokens),
    )


def response_metadata(delta: Delta | ChatDelta, call: Call) -> dict[str, Any]:
    """Metadata of a finished answer, with all statistics under ``rapid``.

    Args:
        delta: last delta of the answer.
        call: options and retrieval of the answer.
    """
    rapid = delta.stats.as_dict() | {"chunks": call.retrieved or []}
    if call.retrieved == []:
        rapid["draft_skipped"] = NOTHING_RETRIEVED
    return {
        "model_name": call.engine.model,
        "finish_reason": delta.finish_reason,
        "rapid": rapid,
    }


def joined(results: Sequence[LLMResult]) -> LLMResult:
    """The answers to several chats, each of which was asked by itself."""
    return LLMResult(
        generations=[generations for result in results for generations in result.generations],
        llm_output={},
        run=[info for result in results for info in result.run or []] or None,
    )
