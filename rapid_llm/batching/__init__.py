"""Many requests at once: rounds over all that are under way, whose passes are joined."""

from rapid_llm.batching.requests import GenerationRequest
from rapid_llm.batching.scheduler import Scheduler

__all__ = ["GenerationRequest", "Scheduler"]
