"""Attention of a chunk of a prefill on Hopper: cuDNN in parts, twice as fast as one call.

A chunk attends to itself causally and to the past without a mask; the results are merged by their
log-sum-exp in float32. cuDNN takes 40 ms to plan for each new shape. So only whole chunks are
supported, and the past is divided into parts of 1, 2, 4, … chunks: five shapes for 128K tokens
instead of 32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rapid_llm.engine.cuda import has_kernels

CHUNK = 2048
"""Number of tokens of a prefill pass: enough to fill the device.

The activations of an 8B model take a gigabyte.
"""

_CUDNN = 91501  # first version whose attention PyTorch itself prefers
_WIDEST = 128  # largest supported head size


def serves(query: Tensor, length: int, window: int | None) -> bool:
    """Whether :func:`attend_chunk` supports a call: whole chunks, 16 bits, no window, on Hopper.

    Args:
        query: queries ``[heads, n, dim]``.
        length: number of keys.
        window: size of the sliding window; None for none.
    """
    return (
        query.shape[1] == CHUNK
        and length % CHUNK == 0
        and window is None
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[2] <= _WIDEST
        and query.shape[2] % 8 == 0
        and has_kernels(query.device)
        and refusal(query.device) is None
    )


@cache
def refusal(device: torch.device) -> str | None:
    """Why :func:`attend_chunk` is not used on a CUDA device; None where it is."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "it is made for Hopper; FlashAttention serves"
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if (version or 0) < _CUDNN:
        return f"cuDNN {version} is older than {_CUDNN}; FlashAttention serves"
    return None


def attend_chunk(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: None = None
) -> Tensor:
    """See :func:`rapid_llm.engine.attention.attend`, without a window."""
    from rapid_llm.engine.cuda.elementwise import merge  # here, because Triton may be missing

    end = key.shape[1] - CHUNK
    mixed, lse = _cudnn(query, key[:, end:], value[:, end:], scaling, causal=True)
    for part in _parts(end):
        start = end - part
        other = _cudnn(query, key[:, start:end], value[:, start:end], scaling, causal=False)
        with torch.cuda.device_of(query):  # Triton launches on the current device
            mixed, lse = merge(mixed, lse, *other)
        end = start
    return mixed.to(query.dtype)


def _parts(past: int) -> list[int]:
    """Sizes of the parts of the past in tokens: powers of two of chunks, ascending."""
    chunks = past // CHUNK
    return [CHUNK << bit for bit in range(chunks.bit_length()) if chunks >> bit & 1]


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention ``[heads, n, dim]`` by cuDNN, and its log-sum-exp, float32 ``[heads, n]``."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query[None], key[None], value[None], None, True, 0.0, causal, False, scale=scaling
    )
    return out[0], lse.view(out.shape[1:3])
