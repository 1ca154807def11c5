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
    reason = refusal(device)
    if reason is not None:
        _log.warning("%s", reason)
    return reason is None


def refusal(device: torch.device) -> str | None:
    """Why our Triton kernels do not run on a CUDA device; None where they do."""
    if find_spec("triton") is None:
        return f"Triton is not installed, so passes on {device} are slower; install it"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        version = ".".join(map(str, capability))
        return (
            f"{device} is older than Ampere (compute capability {version}), so passes on it are "
            "slower"
        )
    return None
