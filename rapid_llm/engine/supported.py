"""Models that are supported: architectures, attention implementations, layers and adapters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from rapid_llm.engine import attention
from rapid_llm.errors import InvalidParameterError, MissingDependencyError, ModelError

SUPPORTED = frozenset(
    {
        "gemma3",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    }
)
"""Supported values of ``config.model_type``: those that the tests compare with transformers."""

ATTENTION = (attention.NAME, "sdpa", "flash_attention_2", "eager")


def not_captured(name: str, device: torch.device) -> InvalidParameterError:
    """The error for ``cuda_graphs=True`` where passes cannot be captured."""
    return InvalidParameterError(
        f"cuda_graphs=True, but passes of {name} on {device} cannot be captured: that takes a "
        "model of the Llama family with our attention, Triton, and an Ampere GPU or a newer one; "
        "leave cuda_graphs out to capture where it can be done"
    )


def require_supported(model: PreTrainedModel, name: str, attn_implementation: str) -> None:
    """Refuse architectures and attention implementations that are not supported.

    Args:
        model: the model.
        name: name of the model in errors.
        attn_implementation: name of the attention implementation.

    Raises:
        ModelError: the architecture or the attention implementation is not supported.
        MissingDependencyError: the attention implementation is not installed.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    require_architecture(model_type, f"{name} ({type(model).__name__})")
    require_attention(attn_implementation, name)
    if getattr(model.config.get_text_config(), "use_bidirectional_attention", None):
        raise ModelError(f"{name} attends in both directions; a causal model is needed")


def require_architecture(model_type: str | None, name: str) -> None:
    """Refuse a model whose ``config.model_type`` is not among :data:`SUPPORTED`.

    Raises:
        ModelError: it is not.
    """
    if model_type not in SUPPORTED:
        raise ModelError(
            f"{name}: architecture {model_type!r} is not supported, "
            f"because its cache could not be rolled back or was never checked; "
            f"supported are {', '.join(sorted(SUPPORTED))}"
        )


def require_attention(attn_implementation: str, name: str) -> None:
    """Refuse an attention implementation that is unknown, or cannot run here.

    Raises:
        ModelError: it is unknown.
        MissingDependencyError: it is not installed.
    """
    if attn_implementation not in ATTENTION:
        raise ModelError(
            f"{name}: attn_implementation={attn_implementation!r} is unknown; "
            f"choose one of {', '.join(ATTENTION)}"
        )
    if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise MissingDependencyError(
            f"{name}: attn_implementation='flash_attention_2' needs the package flash-attn and "
            "a CUDA device; install it, or use 'rapid' or 'sdpa'"
        )


def require_layers_in_order(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose layers were added or removed without adjusting indices and config.

    Raises:
        ModelError: ``layer_idx`` of the layers and ``config.num_hidden_layers`` do not agree.
    """
    layers: Any = model.get_decoder().layers
    promised = model.config.get_text_config().num_hidden_layers
    places = [getattr(layer.self_attn, "layer_idx", i) for i, layer in enumerate(layers)]
    if places != list(range(promised)):
        raise ModelError(
            f"{name}: its layers keep their KV at {places}, but its config promises "
            f"{promised} layers, from 0 on; set config.num_hidden_layers, "
            "and layer_idx of each layer's self_attn"
        )


def require_tokens_alike(model: PreTrainedModel, name: str) -> None:
    """Refuse adapters with which reading a sequence in parts gives another result.

    Raises:
        ModelError: such an adapter is active.
    """
    adapters = getattr(model, "peft_config", None) or {}
    active: Any = getattr(model, "active_adapters", ())
    if not adapters or getattr(model, "_adapters_disabled", False):
        return
    if callable(active):  # transformers' method, which refuses versions of PEFT that do work
        loaded = getattr(model, "_hf_peft_config_loaded", False)  # by transformers, not by PEFT
        active = _active_in_layers(model) if loaded else adapters
    for adapter in active:
        config = adapters[adapter]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if (
            config.is_prompt_learning
            or config.is_adaption_prompt
            or kind == "XLORA"
            or getattr(config, "alora_invocation_tokens", None)
        ):
            raise ModelError(
                f"{name}: the adapter {adapter!r} ({kind}) is not supported, because it adds "
                "to a whole sequence what reading it in parts does not; use an adapter of the "
                "weights, such as LoRA, or disable it"
            )


def _active_in_layers(model: PreTrainedModel) -> list[str]:
    """Names of the adapters that are active in some layer."""
    layers = (getattr(module, "active_adapters", None) for module in model.modules())
    return sorted({name for names in layers if isinstance(names, list) for name in names})
