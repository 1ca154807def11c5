"""Models of Llama's sizes on an H100, and a plan for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from rapid_llm.bench.plan import Plan, paper_retrieved
from rapid_llm.bench.speed_model import DEVICES
from rapid_llm.shapes import ModelSize, size_of

LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    tie_word_embeddings=False,
)


LLAMA_1B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=131_072,
    tie_word_embeddings=True,
)


H100 = DEVICES["h100"]


def size(**changes: Any) -> ModelSize:
    return replace(size_of(LLAMA_8B, "8B"), **changes)


def plan(context: int = 131_072, **changes: Any) -> Plan:
    given: dict[str, Any] = {
        "model": size(),
        "drafter": None,
        "device": H100,
        "context": context,
        "retrieval_tokens": paper_retrieved(context),
        "acceptance": 0.8,
    }
    return Plan(**given | changes)


def save(config: Any, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder)
