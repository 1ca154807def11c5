"""A compiled forward pass of a few tokens, over a model's own weights and KV cache.

It computes what :func:`rapid_llm.engine.lean.lean_logits` does, in one call instead of some
hundreds, and with fewer roundings: between layers numbers stay in float32.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from rapid_llm.engine import native
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.lean import window_of
from rapid_llm.engine.quantization import BlockLinear, Int8Linear

MAX_TOKENS = 32
"""In a pass; for more, PyTorch's matrix products are faster."""


class _Linear(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_int64),
        ("in", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((f"{name}_norm", ctypes.c_void_p) for name in ("input", "post", "query", "key")),
        *((name, _Linear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("window", ctypes.c_int64),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("scaling", ctypes.c_float),
        ("embedding", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("head", _Linear),
        ("layer", ctypes.POINTER(_Layer)),
    ]


def _linear(module: Any) -> _Linear:
    bias = None if module.bias is None else module.bias.data_ptr()
    weight, bits = module.weight, 16
    if isinstance(module, BlockLinear):
        weight, bits = module.blocks, module.bits
    return _Linear(weight.data_ptr(), bias, *module.weight.shape, bits)


def _layer(module: Any) -> _Layer:
    attention, mlp = module.self_attn, module.mlp
    norms = [module.input_layernorm, module.post_attention_layernorm]
    norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return _Layer(
        *(None if norm is None else norm.weight.data_ptr() for norm in norms),
        *map(_linear, linears),
        window=window_of(attention) or native.UNLIMITED,
    )


class _Table:
    """A model's weights as ``native.cpp`` reads them."""

    def __init__(self, model: Any) -> None:
        body, config = model.model, model.config
        attention = body.layers[0].self_attn
        self.layers = (_Layer * len(body.layers))(*map(_layer, body.layers))
        self.model = _Model(
            layers=len(body.layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            dim=attention.head_dim,
            intermediate=config.intermediate_size,
            epsilon=body.norm.variance_epsilon,
            scaling=attention.scaling,
            embedding=body.embed_tokens.weight.data_ptr(),
            norm=body.norm.weight.data_ptr(),
            head=_linear(model.lm_head),
            layer=self.layers,
        )


class NativePass:
    """Passes of a lean model (:func:`rapid_llm.engine.lean.is_lean`); see :func:`native_pass`."""

    def __init__(self, model: Any, library: ctypes.CDLL) -> None:
        self._model = model
        self._library = library
        self._registered = [
            (registry, name, thing)
            for module in model.modules()
            for registry in (module._modules, module._parameters, module._buffers)
            for name, thing in registry.items()
        ]
        tensors = [thing for _, _, thing in self._registered if isinstance(thing, Tensor)]
        # Aliases, which keep the memory that the tables point to.
        self._used = [(tensor, tensor.detach()) for tensor in tensors]
        self._table = _Table(model)

    @property
    def stale(self) -> bool:
        """Whether a weight was moved or a module replaced since."""
        return any(
            registry.get(name) is not thing for registry, name, thing in self._registered
        ) or any(tensor.data_ptr() != used.data_ptr() for tensor, used in self._used)

    def serves(self, ids: Tensor, cache: KVCache) -> bool:
        """Whether this pass can append the tokens: few, within bounds, to a cache in use."""
        n = ids.shape[0]
        if n > MAX_TOKENS or cache.length == 0:  # an empty cache may have no memory yet
            return False
        lowest, highest = ids.aminmax()
        return (
            cache.length + n <= cache.capacity
            and int(lowest) >= 0
            and int(highest) < self._model.model.embed_tokens.weight.shape[0]
        )

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache, keep: int) -> Tensor:
        """As :func:`rapid_llm.engine.lean.lean_logits`; float32 ``[keep, vocab]``."""
        n, length = ids.shape[0], cache.length
        for entry, layer in zip(self._table.layers, cache.layers, strict=True):
            entry.keys, entry.values = layer.keys.data_ptr(), layer.values.data_ptr()
        model = self._table.model
        model.capacity = cache.layers[0].keys.shape[2]
        ids = ids.contiguous()
        # In float32, as the argument is; see lean.py on why this is the model's own module.
        cosine, sine = self._model.model.rotary_emb(torch.empty(1), position_ids=positions[None])
        logits = torch.empty(keep, model.head.out)
        queries = torch.empty(model.layers, model.heads, model.dim)
        self._library.rapid_forward(
            ctypes.byref(model),
            native.pointer(ids),
            ctypes.c_int64(n),
            ctypes.c_int64(length),
            native.pointer(cosine),
            native.pointer(sine),
            ctypes.c_int64(keep),
            ctypes.c_int64(torch.get_num_threads()),
            native.pointer(logits),
            native.pointer(queries),
        )
        for layer, query in zip(cache.layers, queries.to(torch.bfloat16), strict=True):
            layer.length = length + n
            layer.last_query = query
        return logits


def native_pass(model: Any) -> NativePass | None:
    """The compiled pass of a lean model: in bfloat16, on a CPU that has the kernels."""
    library, config = native.kernels(), model.config
    if library is None or not all(
        parameter.device.type == "cpu"
        and parameter.dtype == torch.bfloat16
        and parameter.is_contiguous()
        for parameter in model.parameters()
    ):
        return None
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        return None  # whose scales are a row's
    dim = model.model.layers[0].self_attn.head_dim
    sizes = (dim, config.hidden_size, config.intermediate_size)
    return NativePass(model, library) if all(map(native.fits, sizes)) else None
