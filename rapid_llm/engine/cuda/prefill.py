"""Attention of a chunk of a prompt, on Hopper twice as fast in two calls as in one.

What was read before is attended to without a mask, the chunk itself causally, both by cuDNN; the
results are merged by their sums of exponentials, in float32. cuDNN plans for every shape anew, so
this serves whole chunks, whose pasts are whole chunks as well.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

CHUNK = 4096
"""Tokens that a prefill reads in a pass: their attention fills the device, and the activations of
an 8B model take less than a gigabyte."""

_CUDNN = 91501  # from this version on PyTorch itself takes cuDNN's attention first
_WIDEST = 128  # head sizes


def serves(query: Tensor, window: int | None) -> bool:
    """Whether :func:`attend_chunk` takes these: a whole chunk, 16 bits, no window, on Hopper."""
    return (
        query.shape[1] == CHUNK
        and window is None
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[2] <= _WIDEST
        and query.shape[2] % 8 == 0
        and _is_hopper(query.device)
    )


@cache
def _is_hopper(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) == (9, 0)
        and torch.backends.cudnn.is_available()
        and (torch.backends.cudnn.version() or 0) >= _CUDNN
    )


def attend_chunk(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: None = None
) -> Tensor:
    """As :func:`rapid_llm.engine.attention.attend`, without a window."""
    past = key.shape[1] - query.shape[1]
    own, own_lse = _cudnn(query, key[:, past:], value[:, past:], scaling, causal=True)
    if past == 0:
        return own
    before, before_lse = _cudnn(query, key[:, :past], value[:, :past], scaling, causal=False)
    return merge(before, before_lse, own, own_lse)


def merge(one: Tensor, one_lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Attention over two sets of keys from that over each, ``[..., dim]`` and ``[...]``."""
    share = (other_lse - one_lse).sigmoid()[..., None]
    return torch.lerp(one.float(), other.float(), share).to(one.dtype)


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """``[heads, n, dim]`` and the log-sum-exp, float32 ``[heads, n]``."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query[None], key[None], value[None], None, True, 0.0, causal, False, scale=scaling
    )
    return out[0], lse.view(out.shape[1:3])
