"""Causal attention, dispatched to the fastest kernel of the device.

The query heads that share a KV head become rows of one matrix (GQA packing), so keys and values
are never repeated. The causal mask is aligned to the lower right corner: the last query attends to
every key. The batch size is 1, without padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from rapid_llm.engine.device import device_of
from rapid_llm.errors import ModelError

NAME = "rapid"
"""Name of our attention in transformers (``attn_implementation="rapid"``)."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """Softmax attention of the last ``n`` positions of a sequence of ``length`` tokens.

    Args:
        query: queries of the last n positions, ``[heads, n, dim]``, any float dtype.
        key: keys of all positions, ``[kv_heads, length, dim]``, same dtype; ``heads`` is a
            multiple of ``kv_heads``.
        value: values of all positions, ``[kv_heads, length, value_dim]``.
        scaling: factor on the scores, usually ``dim ** -0.5``.
        window: size of the sliding window: a query at position i attends to the keys in
            ``(i - window, i]``. None for full causal attention.

    Returns:
        ``[heads, n, value_dim]`` in the query's dtype.
    """
    if window is not None and window >= key.shape[1]:
        window = None
    kernel = device_of(query.device).attention(query, key, value, window)
    return kernel(query, key, value, scaling, window)


def _rapid_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: ``[1, heads, n, dim]`` to ``[1, n, heads, value_dim]``.

    Raises:
        ModelError: the model uses a mask, soft-capping or attention sinks.
    """
    if attention_mask is not None or softcap is not None or s_aux is not None:
        raise ModelError(
            f"{type(module).__name__} asks for an attention mask, soft-capping or sinks, which "
            "the 'rapid' attention does not do; load the model with attn_implementation='sdpa'"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(query[0], key[0], value[0], scale, sliding_window)
    return out.transpose(0, 1)[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """Mask function for transformers: no mask is built, as it follows from the shapes."""
    return


AttentionInterface.register(NAME, _rapid_attention)
AttentionMaskInterface.register(NAME, _no_mask)
