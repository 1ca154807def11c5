"""Refuse what can be known to be wrong of the models' options before anything is loaded."""

from __future__ import annotations

from typing import Any

import torch

from rapid_llm.chat import checked_variables
from rapid_llm.config import EngineConfig
from rapid_llm.engine.prefix_cache.prefixes import require_folder_for_limit
from rapid_llm.engine.quantized_drafter import require_format
from rapid_llm.engine.supported import not_captured, require_architecture, require_attention
from rapid_llm.folders import require_folder
from rapid_llm.models import HUB_ACCESS, require_model


def drafter_options(config: EngineConfig) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a drafter loaded by name."""
    shared = {name: value for name, value in config.hub_options.items() if name in HUB_ACCESS}
    return shared | dict(config.drafter_options)


def require_loadable(
    config: EngineConfig, place: dict[str, Any], draft_place: dict[str, Any] | None
) -> None:
    """Refuse names, devices and formats with which a decoder could not be made.

    Args:
        config: the options.
        place, draft_place: where both models go, from :func:`.device_maps.placements`; the latter
            None for a drafter that is loaded already.

    Raises:
        ModelError: a model does not exist, or its architecture is not supported.
        InvalidParameterError: an option does not serve on its device; or a folder cannot be used.
        MissingDependencyError: the packaged model, or a package, is not installed.
    """
    checked_variables(config.chat_template_kwargs)
    require_folder_for_limit(config.kv_cache_dir, config.kv_cache_dir_bytes)
    if config.kv_cache_dir is not None:
        require_folder("kv_cache_dir", config.kv_cache_dir)
    require_attention(config.attn_implementation, config.model)
    _require_model(config, config.model, dict(config.hub_options), place)
    if draft_place is None:
        return
    if config.drafter is not None:
        _require_model(config, config.drafter, drafter_options(config), draft_place)
    quantized, device = config.drafter_quantization, draft_place["device"]
    if quantized is not None and quantized != "auto" and isinstance(device, torch.device):
        require_format(quantized, device, config.drafter or config.model)


def _require_model(
    config: EngineConfig, name: str, options: dict[str, Any], place: dict[str, Any]
) -> None:
    device = place["device"]  # none of a model that is spread, or sharded
    if config.cuda_graphs and isinstance(device, torch.device) and device.type != "cuda":
        raise not_captured(name, device)
    kind = require_model(name, **options)
    if kind is not None:
        require_architecture(kind, name)
