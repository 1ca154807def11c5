"""Numbers of ranks among which a model can be sharded, by transformers' tensor-parallel plan."""

from __future__ import annotations

from math import gcd
from typing import Any

from transformers import PretrainedConfig

from rapid_llm.errors import ModelError


def _divided(config: Any) -> dict[str, int]:
    """Counts that the number of ranks must divide; empty where each rank has all heads."""
    plan = getattr(config, "base_model_tp_plan", None) or {}
    parts: dict[str, int] = {}
    if plan.get("layers.*.self_attn.k_proj") == "colwise":
        parts["KV heads"] = config.num_key_value_heads
        parts["query heads"] = config.num_attention_heads
    if "packed_colwise" in plan.values():
        experts = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        parts["rows of an expert"] = experts
    return parts


def head_divisor(config: PretrainedConfig) -> int:
    """Greatest number of ranks among which the model's heads can be divided.

    Divisors of it are allowed too. 0 where each rank has all heads and all KV, in any number.

    Args:
        config: the model's text config.
    """
    return gcd(*_divided(config).values())


def require_divisible(name: str, config: PretrainedConfig, size: int) -> None:
    """Refuse a model that so many processes cannot share.

    Raises:
        ModelError: it has no plan, or its heads or experts cannot be divided evenly.
    """
    text: Any = config.get_text_config()
    if not getattr(text, "base_model_tp_plan", None):
        raise ModelError(
            f"{name}: transformers has no tensor-parallel plan for {text.model_type!r}; start one "
            "process, and spread the model with device_map"
        )
    parts = _divided(text)
    if all(count % size == 0 for count in parts.values()):
        return
    common = head_divisor(text)
    sizes = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
    what = ", ".join(f"{count:,} {part}" for part, count in parts.items() if count % size)
    raise ModelError(
        f"{name} has {what}, which {size} processes cannot share evenly; sizes that do: {sizes} "
        "(torchrun --nproc-per-node)"
    )
