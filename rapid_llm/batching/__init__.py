"""Many requests at once: rounds over all that are under way, whose passes are joined."""

from rapid_llm.batching.scheduler import Scheduler
from rapid_llm.interface import GenerationRequest

__all__ = ["GenerationRequest", "Scheduler"]
