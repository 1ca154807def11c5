"""Devices of a model's parts, where accelerate has spread them (``device_map``) or offloaded some.

Weights that are offloaded to the host or to disk are meta tensors except during their module's
forward, so that only accelerate's hooks know where the module runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """Device on which the input embeddings run, and on which logits are returned."""
    return _runs_on(model.get_input_embeddings()) or _runs_on(model) or torch.device("meta")


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Devices on which the decoder layers run, and so of their keys and values."""
    layers: Any = model.get_decoder().layers
    return [_runs_on(layer) or input_device(model) for layer in layers]


def _runs_on(module: nn.Module) -> torch.device | None:
    """Device of a module's weights, or of its execution if they are offloaded; None if unknown."""
    for tensor in module.parameters():
        if not tensor.is_meta:
            return tensor.device
    for each in module.modules():
        for hook in _hooks(each):
            place = getattr(hook, "execution_device", None)
            if isinstance(place, int):
                return torch.device("cuda", place)
            if place is not None:
                return torch.device(place)
    return None


def _hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks of a module; it chains several as a hook with an attribute ``hooks``."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
