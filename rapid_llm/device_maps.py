"""Where models are loaded: one device each, or spread over several by accelerate's device maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rapid_llm.config import EngineConfig
from rapid_llm.errors import InvalidParameterError
from rapid_llm.tensor_parallel import processes

WORDS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that accelerate works out."""


def placements(config: EngineConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of :func:`rapid_llm.models.load_model` that place the target and the drafter.

    The drafter goes where the target does, unless it has a device or a device map of its own; a
    mapping of the target's modules does not apply to another drafter.

    Args:
        config: engine options.

    Raises:
        InvalidParameterError: options exclude each other, or have no effect; this machine lacks a
            device.
    """
    for device, spread in (("device", "device_map"), ("drafter_device", "drafter_device_map")):
        if getattr(config, device) is not None and getattr(config, spread) is not None:
            raise InvalidParameterError(
                f"{device}={getattr(config, device)!r} and {spread}={getattr(config, spread)!r} "
                "exclude each other: give one of them"
            )
    for name in ("drafter_device_map", "drafter_options"):
        if getattr(config, name) and config.drafter is None:
            shown = sorted(config.drafter_options) if name == "drafter_options" else "…"
            raise InvalidParameterError(
                f"{name}={shown} need a drafter to load with them: name one, or leave them out"
            )
    if config.max_memory and config.device_map is config.drafter_device_map is None:
        raise InvalidParameterError(
            f"max_memory={dict(config.max_memory)} has no effect without device_map: give "
            "device_map='auto', or leave max_memory out"
        )
    target = _placed(config, config.device, config.device_map)
    drafter = target
    if config.drafter_device is not None or config.drafter_device_map is not None:
        drafter = _placed(config, config.drafter_device, config.drafter_device_map)
    elif isinstance(config.device_map, Mapping) and config.drafter not in (None, config.model):
        drafter = _placed(config, None, None)
    if drafter != target and config.drafter is None:
        raise InvalidParameterError(
            f"drafter_device={config.drafter_device!r} needs a drafter to load there: name one "
            "(the target's own name loads a second copy), or leave drafter_device out"
        )
    return target, drafter


def _placed(
    config: EngineConfig, device: str | None, device_map: str | Mapping[str, Any] | None
) -> dict[str, Any]:
    if device_map is None:
        # Under torchrun a model whose device has no number is sharded over the processes.
        return {"device": resolve_device(device) if processes() == 1 else device}
    limits = {"max_memory": config.max_memory} if config.max_memory else {}
    return {"device": None, "device_map": checked_map(device_map), **limits}


def checked_map(device_map: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """A device map as transformers takes it.

    Args:
        device_map: one of :data:`WORDS`, or a mapping from modules of the model to devices (a
            number of a GPU, a name such as ``cuda:1`` or ``cpu``, or ``disk``).

    Raises:
        InvalidParameterError: it is neither, or names a device that this machine lacks.
    """
    if isinstance(device_map, str) and device_map in WORDS:
        return device_map
    if not isinstance(device_map, Mapping) or not device_map:
        raise InvalidParameterError(
            f"device_map={device_map!r} is not allowed: it must be one of {', '.join(WORDS)}, or a "
            "mapping from modules to devices; for a single device give device="
        )
    return {module: _device(module, place) for module, place in device_map.items()}


def _device(module: str, place: Any) -> Any:
    if isinstance(place, str) and place.isdigit():
        place = int(place)
    if place == "disk":
        return place
    try:
        exists = torch.empty(0, device=place).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InvalidParameterError(
            f"device_map has {place!r} for {module!r}, a device that this machine lacks; use the "
            "number of a GPU, 'cpu' or 'disk'"
        ) from error
    return "cpu" if exists.type == "cpu" else place


def checked_memory(max_memory: Mapping[Any, Any] | None) -> dict[int | str, Any] | None:
    """Memory limits as accelerate takes them: GPUs by number, sizes such as ``20GiB``."""
    if max_memory is None:
        return None
    return {
        int(place) if str(place).isdigit() else place: int(size) if str(size).isdigit() else size
        for place, size in max_memory.items()
    }


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The requested device; for None the first GPU, or the CPU if there is none.

    Raises:
        InvalidParameterError: this machine has no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Allocate on it, because a valid name does not mean that the device exists.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InvalidParameterError(
            f"device={str(device)!r} cannot be used on this machine; use 'cpu', or 'cuda' or "
            "'cuda:1' where there is such a GPU"
        ) from error
