"""Continuous batching: many requests at once, whose forward passes are joined."""

from rapid_llm.batching.scheduler import Scheduler
from rapid_llm.interface import GenerationRequest

__all__ = ["GenerationRequest", "Scheduler"]
