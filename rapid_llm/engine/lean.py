"""Lean forward pass for the Llama family in plain PyTorch, over the loaded model's own weights.

In a small step transformers' forward spends more time between the matrix products than in them.
This pass does the same arithmetic with a third of the calls. It is used only for unmodified models
of the classes below; all others (with adapters, hooks, tensor subclasses) run their own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from rapid_llm.engine.attention import attend
from rapid_llm.engine.device import device_of
from rapid_llm.engine.kv_cache import KVCache, PreallocatedLayer
from rapid_llm.engine.model_state import ModelState
from rapid_llm.engine.quantized import QuantizedLinear

FAMILY = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


def is_lean(state: ModelState) -> bool:
    """Whether :func:`lean_logits` computes the same as the model's own forward, at this moment."""
    model = state.model
    return (
        type(model) in FAMILY
        and model.config.hidden_act == "silu"
        and len({(tensor.device, tensor.dtype) for tensor in model.parameters()}) == 1
        and model.dtype.is_floating_point
        and state.plain
    )


_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")  # others depend on the sequence length


def has_fixed_rotary(model: Any) -> bool:
    """Whether a lean model's rotary embedding is constant, and never waits for the device."""
    return getattr(model.model.rotary_emb, "rope_type", None) in _FIXED_ROTARY


Mix = Callable[[int, Any, Tensor, Tensor, Tensor], Tensor]
"""Attention of a layer over a cache to which the new tokens are written.

A function of ``(index of the layer, its attention module, query, key, value)``, rotated and
``[n, heads, dim]`` each, that returns ``[n, heads, dim]``.
"""


def lean_logits(model: Any, ids: Tensor, positions: Tensor, cache: KVCache, keep: int) -> Tensor:
    """Run a lean model; arguments and result as for :class:`.device.Pass`."""

    def mix(index: int, module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kv: PreallocatedLayer = cache.layers[index]
        keys, values = kv.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None])
        query, window = query.transpose(0, 1), window_of(module)
        return attend(query, keys[0], values[0], module.scaling, window).transpose(0, 1)

    return run(model, ids, positions, mix, slice(-keep, None))


def run(model: Any, ids: Tensor, positions: Tensor, mix: Mix, rows: slice | Tensor) -> Tensor:
    """Run a lean model with any attention.

    Args:
        model: the model.
        ids: token ids, int64 ``[n]``.
        positions: int64 ``[n]``, or longer, see :class:`.device.Pass`.
        mix: attention of each layer.
        rows: tokens for which logits are computed: a slice, or indices.

    Returns:
        Logits ``[rows, vocab]`` in the model's dtype.
    """
    body = model.model
    x = F.embedding(ids, body.embed_tokens.weight)
    # The model's own rotary module, so that all kinds of scaling are right.
    cos, sin = body.rotary_emb(x, position_ids=positions[None])
    half = cos.shape[-1] // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    n = ids.shape[0]
    rotary = cos[0, :n, None], signed[0, :n, None]
    for index, layer in enumerate(body.layers):
        normed = _rms_norm(x, layer.input_layernorm)
        x = x + _attention(index, layer.self_attn, normed, rotary, mix)
        x = x + _mlp(layer.mlp, _rms_norm(x, layer.post_attention_layernorm))
    return _linear(_rms_norm(x[rows], body.norm), model.lm_head)


def _attention(
    index: int, module: Any, x: Tensor, rotary: tuple[Tensor, Tensor], mix: Mix
) -> Tensor:
    n, dim = x.shape[0], module.head_dim
    query, key, value = (part.view(n, -1, dim) for part in _projections(module, x))
    if hasattr(module, "q_norm"):  # Qwen3
        query, key = _rms_norm(query, module.q_norm), _rms_norm(key, module.k_norm)
    heads = query.shape[1]
    rotated = _rotate(torch.cat([query, key], dim=1), rotary)
    mixed = mix(index, module, rotated[:, :heads], rotated[:, heads:], value)
    return _linear(mixed.reshape(n, -1), module.o_proj)


def window_of(attention: Any) -> int | None:
    """Size of the sliding window of an attention layer; None for full causal attention."""
    return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))


def _projections(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, ``[n, heads * dim]`` each; one product in a quantized copy."""
    together: Any = getattr(module, "qkv_proj", None)
    if together is not None:
        return together.forward(x)
    return _linear(x, module.q_proj), _linear(x, module.k_proj), _linear(x, module.v_proj)


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of ``[n, heads, dim]``: x cos + (-x2, x1) sin, with x = (x1, x2)."""
    cos, signed_sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)


def _mlp(module: Any, x: Tensor) -> Tensor:
    together: Any = getattr(module, "gate_up_proj", None)
    if together is not None:
        gate, up = together.forward(x)
    else:
        gate, up = _linear(x, module.gate_proj), _linear(x, module.up_proj)
    return _linear(F.silu(gate).mul_(up), module.down_proj)


def _linear(x: Tensor, module: Any) -> Tensor:
    if isinstance(module, QuantizedLinear):
        return module.forward(x)
    return device_of(x.device).linear(x, module.weight, module.bias)


def _rms_norm(x: Tensor, module: Any) -> Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
