"""Copies of a model that share its weights: with fewer layers, or for longer prompts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from rapid_llm.errors import InvalidParameterError, ModelError


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with its own modules and config, which shares the model's tensors."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    # Inference tensors made for the copy could not be used outside inference mode.
    with torch.inference_mode(False):
        return copy.deepcopy(model, shared)


def first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A copy of a model with its first layers only; all weights are shared.

    Args:
        model: the model, which keeps its decoder layers in ``model.model.layers``.
        layers: number of layers to keep, at least 1.

    Raises:
        InvalidParameterError: the model has fewer layers.
        ModelError: the model keeps its decoder layers elsewhere.
    """
    every = getattr(getattr(model, "model", None), "layers", None)
    if every is None:
        raise ModelError(
            f"{type(model).__name__} keeps its layers in another place than the Llama family, so "
            "that it cannot be shortened; take a model of that family"
        )
    if not 1 <= layers <= len(every):
        raise InvalidParameterError(
            f"layers={layers} is not allowed: the model has {len(every)} layers, take from 1 to "
            "all of them"
        )
    shorter: Any = sharing_copy(model)
    shorter.model.layers = shorter.model.layers[:layers]
    shorter.config.num_hidden_layers = layers
    if getattr(shorter.config, "layer_types", None) is not None:
        shorter.config.layer_types = shorter.config.layer_types[:layers]
    return shorter


def stretched(model: Any, tokens: int) -> PreTrainedModel:
    """The same model for prompts of ``tokens`` tokens, by a YaRN-scaled rotary embedding.

    For speed only: the model was not trained so. Every weight is shared, not copied.

    Raises:
        InvalidParameterError: its rotary embedding cannot be replaced so.
    """
    original = int(model.config.get_text_config().max_position_embeddings)
    if tokens <= original:
        return model
    rope = getattr(model.config, "rope_parameters", None) or {}
    if "rope_type" not in rope or not hasattr(model.model, "rotary_emb"):
        raise InvalidParameterError(
            f"{tokens:,} tokens are more than the {original:,} of {model.config.model_type}, whose "
            "rotary embedding cannot be scaled here; take a shorter context"
        )
    longer: Any = sharing_copy(model)
    longer.config.rope_parameters = {
        **rope,
        "rope_type": "yarn",
        "factor": -(-tokens // original) * 1.0,
        "original_max_position_embeddings": original,
    }
    longer.model.rotary_emb = type(longer.model.rotary_emb)(longer.config)
    return longer
