"""Prompts and options of drafters of tiny models."""

from __future__ import annotations

import torch

from rapid_llm.config import SamplingParams

CPU = torch.device("cpu")
PROMPT = [5 + (i * i * 7) % 23 for i in range(40)]
DRAFT_PROMPT = PROMPT[10:30]
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=40, seed=3, ignore_eos=True)
