"""Prompts and options of a tiny decoder's calls, and its forward passes counted."""

from __future__ import annotations

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.engine.model_runner import ModelRunner

TARGET_PROMPT = [5, 9, 31, 7, 44, 12, 8, 30, 21, 17, 60, 3]
DRAFT_PROMPT = [31, 7, 44, 3]
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=40, seed=11, ignore_eos=True)
EXACT = SpeculationConfig(gamma=4, mode="exact")


class CountedForward:
    """Counts the tokens of each forward pass."""

    def __init__(self, monkeypatch) -> None:
        self.passes: list[int] = []
        self.caches = {}
        original = ModelRunner.__call__

        def spy(runner, tokens, cache, *args):
            self.passes.append(len(tokens))
            self.caches[id(cache)] = cache
            return original(runner, tokens, cache, *args)

        monkeypatch.setattr(ModelRunner, "__call__", spy)
