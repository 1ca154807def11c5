"""Forward pass of a lean model on CUDA in ten kernels per layer, without host synchronisation.

It computes the same as :func:`rapid_llm.engine.lean.lean_logits`. Projections of the same input are
one product: their weights are moved into one tensor, and the modules' weights become views of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapid_llm.engine.attention import attend
from rapid_llm.engine.cuda.attention import attend_cached
from rapid_llm.engine.cuda.elementwise import add_rms_norm, rotate_and_store, silu_times
from rapid_llm.engine.cuda.state import PAST, POSITION_OFFSET
from rapid_llm.engine.kv_cache import KVCache, PreallocatedLayer
from rapid_llm.engine.lean import window_of

Product = Callable[[Tensor], Tensor]
"""Matrix product with the weights of a layer: ``[n, in]`` to ``[n, out]``."""


class _Norm(NamedTuple):
    weight: Tensor
    epsilon: float


class _Layer(NamedTuple):
    before: _Norm
    projections: Product
    head_norms: tuple[Tensor, Tensor, float] | None
    heads: int
    kv_heads: int
    dim: int
    scaling: float
    window: int | None
    output: Product
    between: _Norm
    gate_up: Product
    down: Product


class FusedPass:
    """Forward passes over the current weights of a lean model.

    Args:
        model: lean model, see :func:`rapid_llm.engine.lean.is_lean`.
    """

    def __init__(self, model: Any) -> None:
        body = model.model
        self._embedding = body.embed_tokens.weight
        self._rotary = body.rotary_emb
        self._norm = _norm(body.norm)
        self._head = _product(model.lm_head)
        self._layers = [_layer(layer) for layer in body.layers]

    def __call__(
        self, tokens: Tensor, state: Tensor, cache: KVCache | None = None, keep: int | None = None
    ) -> Tensor:
        """Run the model on new tokens and write their KV to the cache that ``state`` describes.

        The lengths in the cache and in ``state`` do not change; the caller updates them.

        Args:
            tokens: token ids, int64 ``[n]`` on the device.
            state: state of the cache, int64, see :mod:`rapid_llm.engine.cuda.state`.
            cache: the same cache, to use the fastest attention for n tokens with the length from
                the host; None for attention that can be captured.
            keep: number of last tokens for which logits are computed; None for all.

        Returns:
            Logits ``[keep, vocab]`` in the model's dtype.
        """
        n = tokens.shape[0]
        x = F.embedding(tokens, self._embedding)
        first = state[PAST] + state[POSITION_OFFSET]
        positions = first + torch.arange(n, device=tokens.device)
        cosine, sine = self._rotary(x, position_ids=positions[None])
        rotary = cosine[0].contiguous(), sine[0].contiguous()
        delta = None
        for index, layer in enumerate(self._layers):
            query = rotate_and_store(
                layer.projections(add_rms_norm(x, delta, *layer.before)),
                rotary,
                layer.head_norms,
                state,
                index,
                layer.heads,
                layer.kv_heads,
            )
            if cache is None:
                mixed = attend_cached(
                    query, state, index, layer.kv_heads, layer.scaling, layer.window
                )
            else:
                mixed = _attend(query, cache.layers[index], layer)
            normed = add_rms_norm(x, layer.output(mixed.reshape(n, -1)), *layer.between)
            delta = layer.down(silu_times(layer.gate_up(normed)))
        last = slice(n - (keep or n), n)
        assert delta is not None
        return self._head(add_rms_norm(x[last], delta[last], *self._norm))

    def allocate(self, cache: KVCache) -> None:
        """Allocate the memory of a new cache."""
        for kv, layer in zip(cache.layers, self._layers, strict=True):
            if not kv.is_initialized:
                sample = self._embedding.new_empty(1, layer.kv_heads, 0, layer.dim)
                kv.lazy_initialization(sample, sample)


def _attend(query: Tensor, kv: PreallocatedLayer, layer: _Layer) -> Tensor:
    """Attention of queries ``[n, heads, dim]`` over a layer, including the n new tokens in it."""
    end = kv.length + query.shape[0]
    keys, values = kv.keys[0, :, :end], kv.values[0, :, :end]
    return attend(query.transpose(0, 1), keys, values, layer.scaling, layer.window).transpose(0, 1)


def _layer(module: Any) -> _Layer:
    attention, mlp = module.self_attn, module.mlp
    dim = attention.head_dim
    norms = None
    if hasattr(attention, "q_norm"):  # Qwen3
        query_norm, key_norm = attention.q_norm, attention.k_norm
        norms = query_norm.weight, key_norm.weight, query_norm.variance_epsilon
    return _Layer(
        before=_norm(module.input_layernorm),
        projections=_fused_product(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj")),
        head_norms=norms,
        heads=attention.q_proj.weight.shape[0] // dim,
        kv_heads=attention.k_proj.weight.shape[0] // dim,
        dim=dim,
        scaling=attention.scaling,
        window=window_of(attention),
        output=_product(attention.o_proj),
        between=_norm(module.post_attention_layernorm),
        gate_up=_fused_product(mlp, "gate_up_proj", ("gate_proj", "up_proj")),
        down=_product(mlp.down_proj),
    )


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight, module.variance_epsilon)


def _product(module: Any) -> Product:
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    product: Product = module.product
    return product


def _fused_product(parent: Any, name: str, names: Sequence[str]) -> Product:
    """One product for several layers: that of a quantized copy, or one with fused weights."""
    quantized = getattr(parent, name, None)
    if quantized is not None:
        return _product(quantized)
    linears = [getattr(parent, each) for each in names]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return partial(
        F.linear,
        weight=fuse([linear.weight for linear in linears]),
        bias=fuse(biases) if biases else None,
    )


def fuse(weights: Sequence[nn.Parameter]) -> Tensor:
    """Concatenate weights ``[out, ...]`` along the first dimension, and make them views of the sum.

    Nothing is stored twice, and the parameters remain the same objects. Weights that are such views
    already are not moved.
    """
    first, sizes = weights[0], [weight.shape[0] for weight in weights]
    row = first.numel() // first.shape[0]
    starts = [first.storage_offset() + row * sum(sizes[:i]) for i in range(len(sizes))]
    if all(
        weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and weight.storage_offset() == start
        and weight.is_contiguous()
        for weight, start in zip(weights, starts, strict=True)
    ):
        shape = (sum(sizes), *first.shape[1:])
        return torch.as_strided(first.detach(), shape, first.stride(), starts[0])
    with torch.inference_mode(first.is_inference()):  # trainable weights remain trainable
        together = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, together.split(sizes), strict=True):
            weight.data = part
    return together
