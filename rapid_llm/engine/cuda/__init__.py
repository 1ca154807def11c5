"""CUDA implementation: Triton kernels and CUDA graphs for few tokens, prefill, int4 layers."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

import torch

_OLDEST = (8, 0)  # Ampere: the first with bfloat16 and asynchronous copies

_log = logging.getLogger(__name__)


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether our Triton kernels run on a device; if not, the reason is logged once."""
    if device.type != "cuda":
        return False
    if find_spec("triton") is None:
        _log.warning("Triton is not installed, so passes on %s are slower; install it", device)
        return False
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        _log.warning(
            "%s is older than Ampere (compute capability %d.%d), so passes on it are slower",
            device,
            *capability,
        )
        return False
    return True
