"""Facts about positions in a model's config: context window, sliding windows, rotary scaling."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from rapid_llm.errors import ModelError


def context_window(config: PretrainedConfig) -> int:
    """Context window in tokens, including YaRN scaling."""
    window = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn":
        original = rope.get("original_max_position_embeddings") or window
        window = max(window, int(original * rope["factor"]))
    return window


def slides(config: PretrainedConfig) -> bool:
    """Whether any layer has a sliding window."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return "sliding_attention" in types
    return getattr(config, "sliding_window", None) is not None


def switches(config: PretrainedConfig) -> list[int]:
    """Sequence lengths beyond which the rotary embedding changes for all positions.

    Longrope has one; KV of a shorter sequence is invalid beyond it.
    """
    return [
        int(rope["original_max_position_embeddings"])
        for rope in _ropes(config)
        if rope.get("rope_type") == "longrope"
    ]


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Parameters of the rotary embeddings: one set, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [each for each in rope.values() if isinstance(each, dict) and "rope_type" in each]
    return nested or [rope]


def scale(config: PretrainedConfig, length: int, name: str) -> int:
    """Number of switches of the rotary embedding that a sequence has passed.

    Args:
        config: configuration of the text model.
        length: length of the whole sequence in tokens.
        name: name of the model in errors.

    Raises:
        ModelError: the rotary embedding changes with every token at this length.
    """
    window = int(config.max_position_embeddings)
    if length > window and any(rope.get("rope_type") == "dynamic" for rope in _ropes(config)):
        raise ModelError(
            f"{name} scales its rotary embedding dynamically: beyond {window} tokens "
            f"(here {length}) each new one changes all before it; stay below, or load the "
            "model with rope_type 'yarn'"
        )
    return sum(length > switch for switch in switches(config))
