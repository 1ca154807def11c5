"""Forward pass of a lean model on CUDA in ten kernels per layer, without host synchronisation.

It computes the same as :func:`rapid_llm.engine.lean.lean_logits`. Projections of the same input are
one product: their weights are moved into one tensor, and the modules' weights become views of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rapid_llm.engine.attention import attend
from rapid_llm.engine.cuda.attention import attend_cached
from rapid_llm.engine.cuda.batch import BatchState
from rapid_llm.engine.cuda.elementwise import add_rms_norm, rotate_and_store, silu_times
from rapid_llm.engine.cuda.state import PAST, POSITION_OFFSET
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.lean import window_of

Product = Callable[[Tensor], Tensor]
"""Matrix product with the weights of a layer: ``[n, in]`` to ``[n, out]``."""


class _Norm(NamedTuple):
    weight: Tensor
    epsilon: float


class Layer(NamedTuple):
    """Weights and numbers of a layer."""

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


class KV(Protocol):
    """Keys and values that a pass writes and reads.

    Attributes:
        state: state for kernels, of one cache or of several, see
            :mod:`rapid_llm.engine.cuda.state` and :mod:`rapid_llm.engine.cuda.batch`.
    """

    @property
    def state(self) -> Tensor | BatchState: ...

    def positions(self, n: int) -> Tensor:
        """Positions of the n new tokens, int64 ``[n]`` on the device."""

    def attend(self, query: Tensor, index: int, layer: Layer) -> Tensor:
        """Attention of the new tokens in a layer, which has their keys and values by now.

        Args:
            query: rotated queries, ``[n, heads, dim]``.
            index: index of the layer.
            layer: the layer.

        Returns:
            ``[n, heads, dim]``.
        """


class StateKV:
    """The cache that a state describes, with attention that can be captured."""

    def __init__(self, state: Tensor) -> None:
        self.state = state

    def positions(self, n: int) -> Tensor:
        first = self.state[PAST] + self.state[POSITION_OFFSET]
        return first + torch.arange(n, device=self.state.device)

    def attend(self, query: Tensor, index: int, layer: Layer) -> Tensor:
        return attend_cached(query, self.state, index, layer.kv_heads, layer.scaling, layer.window)


class HostKV(StateKV):
    """The same, with the fastest attention for each number of tokens, chosen by the host."""

    def __init__(self, state: Tensor, cache: KVCache) -> None:
        super().__init__(state)
        self._cache = cache

    def attend(self, query: Tensor, index: int, layer: Layer) -> Tensor:
        kv = self._cache.layers[index]
        end = kv.length + query.shape[0]
        keys, values = kv.keys[0, :, :end], kv.values[0, :, :end]
        mixed = attend(query.transpose(0, 1), keys, values, layer.scaling, layer.window)
        return mixed.transpose(0, 1)


class FusedPass:
    """Forward passes over the current weights of a lean model.

    Args:
        model: lean model, see :func:`rapid_llm.engine.lean.is_lean`.

    Attributes:
        embedding: weight of the token embedding, ``[vocab, hidden]``.
        layers: the model's layers.
    """

    def __init__(self, model: Any) -> None:
        body = model.model
        self.embedding = body.embed_tokens.weight
        self._rotary = body.rotary_emb
        self._norm = _norm(body.norm)
        self._head = _product(model.lm_head)
        self.layers = [_layer(layer) for layer in body.layers]

    def __call__(self, tokens: Tensor, kv: KV, keep: int | None = None) -> Tensor:
        """Run the model on new tokens and write their KV.

        Args:
            tokens: token ids, int64 ``[n]`` on the device.
            kv: the KV cache, or those of several sequences. Its lengths do not change; the caller
                updates them.
            keep: number of last tokens for which logits are computed; None for all.

        Returns:
            Logits ``[keep, vocab]`` in the model's dtype.
        """
        n = tokens.shape[0]
        x = F.embedding(tokens, self.embedding)
        cosine, sine = self._rotary(x, position_ids=kv.positions(n)[None])
        rotary = cosine[0].contiguous(), sine[0].contiguous()
        delta = None
        for index, layer in enumerate(self.layers):
            query = rotate_and_store(
                layer.projections(add_rms_norm(x, delta, *layer.before)),
                rotary,
                layer.head_norms,
                kv.state,
                index,
                layer.heads,
                layer.kv_heads,
            )
            mixed = kv.attend(query, index, layer)
            normed = add_rms_norm(x, layer.output(mixed.reshape(n, -1)), *layer.between)
            delta = layer.down(silu_times(layer.gate_up(normed)))
        last = slice(n - (keep or n), n)
        assert delta is not None
        return self._head(add_rms_norm(x[last], delta[last], *self._norm))

    def allocate(self, cache: KVCache) -> None:
        """Allocate the memory of a new cache."""
        for kv, layer in zip(cache.layers, self.layers, strict=True):
            if not kv.is_initialized:
                sample = self.embedding.new_empty(1, layer.kv_heads, 0, layer.dim)
                kv.lazy_initialization(sample, sample)


def _layer(module: Any) -> Layer:
    attention, mlp = module.self_attn, module.mlp
    dim = attention.head_dim
    norms = None
    if hasattr(attention, "q_norm"):  # Qwen3
        query_norm, key_norm = attention.q_norm, attention.k_norm
        norms = query_norm.weight, key_norm.weight, query_norm.variance_epsilon
    return Layer(
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
