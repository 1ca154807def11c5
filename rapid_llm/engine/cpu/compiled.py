"""The compiled forward pass for few tokens on a CPU, over a model's own weights and KV cache.

It computes the same as :func:`rapid_llm.engine.lean.lean_logits` in one call instead of hundreds,
and rounds less: the residual stream stays in float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rapid_llm.engine.cpu import kernels
from rapid_llm.engine.cpu.blocks import BLOCK_BYTES, GROUP, ROWS, BlockLinear
from rapid_llm.engine.joined import caches_of, reads_of
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.lean import window_of
from rapid_llm.engine.parts import Part, kept_tokens, positions_of
from rapid_llm.engine.quantized import QuantizedLinear
from rapid_llm.engine.snapshot import is_plain_tensor
from rapid_llm.errors import ModelError

MAX_TOKENS = 32
"""Maximum number of tokens in a pass; for more, PyTorch's matrix products are faster."""

MAX_JOINED_TOKENS = 128
"""The same for several sequences, which PyTorch's operators read in more passes over the keys."""


class _Linear(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_int64),
        ("in", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    ]


_LINEARS = ("query", "key", "value", "output", "gate", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((f"{name}_norm", ctypes.c_void_p) for name in ("input", "post", "query", "key")),
        *((name, _Linear) for name in _LINEARS),
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
        ("epsilon", ctypes.c_float),
        ("scaling", ctypes.c_float),
        ("embedding", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("head", _Linear),
        ("layer", ctypes.POINTER(_Layer)),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        ("keys", ctypes.POINTER(ctypes.c_void_p)),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
        ("capacity", ctypes.c_int64),
        ("first", ctypes.c_int64),
    ]


class _Stretch(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("cache", "start", "end", "token", "tokens")]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "kept", "stretches")),
        *((name, ctypes.c_void_p) for name in ("ids", "owner", "ends", "keep", "cosine", "sine")),
        ("cache", ctypes.POINTER(_Cache)),
        ("stretch", ctypes.POINTER(_Stretch)),
    ]


class _UnfitError(ValueError):
    """A tensor or module does not have the layout that ``kernels.cpp`` expects."""


def _require(fits: bool) -> None:
    if not fits:
        raise _UnfitError


def _address(tensor: Tensor, *shape: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Address of a tensor's data; raises _UnfitError unless it is contiguous with this shape."""
    _require(
        is_plain_tensor(tensor)
        and tensor.device.type == "cpu"
        and tensor.dtype == dtype
        and tensor.shape == shape
        and tensor.is_contiguous()
    )
    return tensor.data_ptr()


def _linear(module: Any, out: int, into: int) -> _Linear:
    _require(kernels.fits(into))
    bias = None if module.bias is None else _address(module.bias, out)
    if isinstance(module, BlockLinear):
        shape = -(-out // ROWS), into // GROUP, BLOCK_BYTES[module.bits]
        weight = _address(module.blocks, *shape, dtype=torch.uint8)
        return _Linear(weight, bias, out, into, module.bits)
    _require(not isinstance(module, QuantizedLinear))  # other kinds have one scale per row
    return _Linear(_address(module.weight, out, into), bias, out, into, 16)


def _buffer(*shape: int) -> Tensor:
    """An uninitialised float32 tensor on the CPU, whatever PyTorch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


class _Table:
    """The structs with addresses of a model's weights that ``kernels.cpp`` reads.

    Raises:
        _UnfitError: the weights do not have the layout that it expects.
    """

    def __init__(self, model: Any) -> None:
        body, config = model.model, model.config
        hidden, inner = config.hidden_size, config.intermediate_size
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        attention = body.layers[0].self_attn
        dim, scaling, epsilon = attention.head_dim, attention.scaling, body.norm.variance_epsilon
        _require(kernels.fits(dim) and heads % kv_heads == 0)

        def norm(module: Any, size: int) -> int | None:
            if module is None:
                return None
            _require(module.variance_epsilon == epsilon)
            return _address(module.weight, size)

        def layer(module: Any) -> _Layer:
            attention, mlp = module.self_attn, module.mlp
            _require((attention.head_dim, attention.scaling) == (dim, scaling))
            return _Layer(
                norm(module.input_layernorm, hidden),
                norm(module.post_attention_layernorm, hidden),
                norm(getattr(attention, "q_norm", None), dim),
                norm(getattr(attention, "k_norm", None), dim),
                _linear(attention.q_proj, heads * dim, hidden),
                _linear(attention.k_proj, kv_heads * dim, hidden),
                _linear(attention.v_proj, kv_heads * dim, hidden),
                _linear(attention.o_proj, hidden, heads * dim),
                _linear(mlp.gate_proj, inner, hidden),
                _linear(mlp.up_proj, inner, hidden),
                _linear(mlp.down_proj, hidden, inner),
                window=window_of(attention) or kernels.UNLIMITED,
            )

        self.layers = (_Layer * len(body.layers))(*map(layer, body.layers))
        self.vocab_size = body.embed_tokens.weight.shape[0]
        self.model = _Model(
            layers=len(body.layers),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            intermediate=inner,
            epsilon=epsilon,
            scaling=scaling,
            embedding=_address(body.embed_tokens.weight, self.vocab_size, hidden),
            norm=norm(body.norm, hidden),
            head=_linear(model.lm_head, model.lm_head.weight.shape[0], hidden),
            layer=self.layers,
        )
        linears = [getattr(each, name) for each in self.layers for name in _LINEARS]
        few = [linear.bits < 16 for linear in (self.model.head, *linears)]
        _require(all(few) or not any(few))


class CompiledPass:
    """Compiled passes of a lean model (:func:`rapid_llm.engine.lean.is_lean`).

    It keeps addresses of weights, and must be made again when the model has changed.

    Args:
        model: the model.
        library: the compiled kernels.
    """

    def __init__(self, model: Any, library: ctypes.CDLL) -> None:
        self._library = library
        self._rotary = model.model.rotary_emb
        self._table = _Table(model)
        # Aliases, which keep the memory alive that the structs point to.
        self._used = [t.detach() for t in (*model.parameters(), *model.buffers())]

    def serves(self, ids: Tensor, cache: KVCache, keep: int) -> bool:
        """Whether the tokens are few and valid, and the cache is in use and has room for them."""
        return len(ids) <= MAX_TOKENS and self.joins([Part(ids, cache, keep)])

    def joins(self, parts: Sequence[Part]) -> bool:
        """The same for several sequences."""
        if sum(len(part.ids) for part in parts) > MAX_JOINED_TOKENS:
            return False
        lenders = {segment.cache for part in parts for segment in part.cache.prefix}
        return all(map(self._fits, lenders)) and all(map(self._takes, parts))

    def _takes(self, part: Part) -> bool:
        ids, cache, keep = part
        held = cache.layers[0].length
        if not (0 < keep <= len(ids) and ids.dtype == torch.int64 and cache.length > 0):
            return False
        if any(layer.length != held for layer in cache.layers):
            return False
        lowest, highest = ids.aminmax()
        return (
            self._fits(cache)
            and cache.length + len(ids) <= cache.capacity
            and int(lowest) >= 0
            and int(highest) < self._table.vocab_size
        )

    def _fits(self, cache: KVCache) -> bool:
        """Whether the kernels can read the buffers of a cache."""
        model = self._table.model
        shape = (1, model.kv_heads, cache.capacity - cache.prefix_length, model.dim)
        return len(cache.layers) == model.layers and all(
            layer.is_initialized
            and layer.keys.shape == layer.values.shape == shape
            and layer.keys.dtype == layer.values.dtype == torch.bfloat16
            and layer.keys.is_contiguous()
            and layer.values.is_contiguous()
            for layer in cache.layers
        )

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache, keep: int) -> Tensor:
        """See :func:`rapid_llm.engine.lean.lean_logits`; returns float32 ``[keep, vocab]``."""
        return self._run([Part(ids, cache, keep)], positions)

    def joined(self, parts: Sequence[Part]) -> list[Tensor]:
        """See :func:`rapid_llm.engine.joined.joined_logits`; returns float32 logits."""
        logits = self._run(parts, _longs(positions_of(parts)))
        return list(logits.split([part.keep for part in parts]))

    def _run(self, parts: Sequence[Part], positions: Tensor) -> Tensor:
        """Logits of all parts, float32 ``[kept tokens, vocab]``."""
        model, reads, kept = self._table.model, reads_of(parts), _longs(kept_tokens(parts))
        number = caches_of(reads)
        ids = torch.cat([part.ids for part in parts])
        owner = _longs([number[part.cache] for part in parts for _ in range(len(part.ids))])
        n = len(ids)
        ends = positions[:n] + 1
        # The model's own module, for all kinds of scaling; float32, the dtype of its argument.
        rotary = self._rotary(_buffer(1), position_ids=positions[None])
        cosine, sine = (part[0, :n].contiguous() for part in rotary)
        if cosine.shape != (n, model.dim) or cosine.dtype != torch.float32:
            raise ModelError(
                f"the rotary embedding gives {cosine.dtype} {list(cosine.shape)} for heads of size "
                f"{model.dim}; set head_dim or partial_rotary_factor in the model's config"
            )
        logits = _buffer(len(kept), model.head.out)
        arrays = (tensor.data_ptr() for tensor in (ids, owner, ends, kept, cosine, sine))
        batch = _Batch(n, len(kept), len(reads), *arrays)
        batch.cache = (_Cache * len(number))(*map(_addresses, number))
        batch.stretch = (_Stretch * len(reads))(
            *(
                _Stretch(number[cache], start, end, tokens.start, tokens.stop - tokens.start)
                for cache, start, end, tokens, *_ in reads
            )
        )
        self._library.rapid_forward(
            ctypes.byref(model),
            ctypes.byref(batch),
            ctypes.c_int64(kernels.threads()),
            kernels.pointer(logits),
        )
        for part in parts:
            part.cache.advance(len(part.ids))
        return logits


def _longs(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _addresses(cache: KVCache) -> _Cache:
    """Where a cache's buffers lie."""
    addresses = ctypes.c_void_p * len(cache.layers)
    keys = addresses(*(layer.keys.data_ptr() for layer in cache.layers))
    values = addresses(*(layer.values.data_ptr() for layer in cache.layers))
    capacity = cache.capacity - cache.prefix_length
    pointer = ctypes.POINTER(ctypes.c_void_p)
    return _Cache(
        ctypes.cast(keys, pointer), ctypes.cast(values, pointer), capacity, cache.first_position
    )


def compiled_pass(model: Any) -> CompiledPass | None:
    """The compiled pass of a lean model; None unless it is in bfloat16 and the CPU has kernels."""
    library = kernels.kernels()
    if library is None:
        return None
    try:
        return CompiledPass(model, library)
    except _UnfitError:
        return None
