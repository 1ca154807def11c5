"""What the speed model needs to know of this machine, measured in a few seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import cycle
from statistics import median

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from rapid_llm.bench.model_size import size_of
from rapid_llm.bench.speed_model import Device, ModelSize, flops
from rapid_llm.engine.attention import attend
from rapid_llm.engine.costs import measure
from rapid_llm.engine.device import device_of
from rapid_llm.engine.forward import Forward
from rapid_llm.engine.session import Session
from rapid_llm.models import device_memory, resolve_device

_COLD = 2**28  # bytes: read in turn, they find no cache that holds them
_LONG = 32_768  # cached tokens, from which on attention reads as fast as it ever will
_SHORT = 64  # of which next to nothing is read
_WIDTH = 2048  # of a model from which on its matrices are read as fast as they ever will
_LAYERS = 8
_REPEATS = 5


@torch.inference_mode()
def measure_device(size: ModelSize, context: int) -> Device:
    """Measure the first GPU, or else the CPU, in bf16; medians of a few runs.

    Args:
        size: a model; attention is timed with its heads, matrix products with its width.
        context: tokens it will hold; attention is timed over so many, from 2,048 to 32,768.
    """
    place = resolve_device(None)
    on_gpu = place.type == "cuda"
    name = torch.cuda.get_device_name(place) if on_gpu else "this CPU"
    length = min(max(context, 2048), _LONG)
    overhead = _layer_overhead(place)
    prefill = _prefill_flops(size, place)
    if on_gpu:
        weights, kv = _weight_bandwidth(size, place), _kv_bandwidth(size, length, place)
        few = prefill
    else:
        weights, kv, few = _pass_rates(size, length, overhead)
    conditions = "" if on_gpu else f" (threads: {torch.get_num_threads()}{_load()})"
    return Device(
        name=name,
        bandwidth=weights,
        kv_bandwidth=kv,
        flops=prefill,
        pass_flops=few,
        memory=device_memory(place),
        layer_overhead=overhead,
        overlaps=on_gpu,
        source=f"measured just now in bf16{conditions}: weights are read at {weights / 1e9:,.1f} "
        f"GB/s, KV at {kv / 1e9:,.1f} GB/s, matrix products do {prefill / 1e12:,.2f} TFLOP/s in a "
        f"prefill and {few / 1e12:,.2f} in passes of few tokens, a layer takes "
        f"{overhead * 1e6:.0f} µs beside",
    )


def _pass_rates(size: ModelSize, length: int, overhead: float) -> tuple[float, float, float]:
    """Of the passes that decode on a CPU: bytes/s of weights and of KV, and operations/s.

    The model has this one's heads and width. What another token costs is arithmetic; the rest of a
    pass, but for the layers' overhead, is reading: of KV, too, where the context is long.
    """
    width = min(size.hidden_size, _WIDTH)
    weights = width * (2 * size.head_dim * (size.heads + size.kv_heads) + 12 * width)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=min(max(2, _COLD // (2 * weights)), 4 * _LAYERS),
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
    )
    forward = Forward(LlamaForCausalLM(config).bfloat16(), "a model of this width")
    shallow = size_of(config, forward.name)
    ones = _ones(1, size.kv_heads, length, size.head_dim, place=torch.device("cpu"))
    costs = []
    for tokens in (_SHORT, length):
        cache = forward.new_cache(length + _SHORT)
        for layer in cache.layers:
            layer.update(ones[:, :, :tokens], ones[:, :, :tokens])
        costs.append(measure(Session(forward, cache)))
    short, long = costs
    fixed = short.first - short.row - shallow.layers * overhead
    reading = (long.first - long.row) - (short.first - short.row)
    least = short.first / 10  # noise must not make a difference negative
    return (
        shallow.bytes_read(1, "bf16") / max(fixed, least),
        shallow.kv_bytes_per_token * length / max(reading, least),
        flops(shallow, 1, length) / max(long.row, least / 10),
    )


def _weight_bandwidth(size: ModelSize, place: torch.device) -> float:
    """Bytes/s of the matrix products of one token."""
    matrices = _matrices(size, place)
    one = _ones(1, size.hidden_size, place=place)
    return matrices.nbytes / _seconds(lambda: [F.linear(one, matrix) for matrix in matrices], place)


def _prefill_flops(size: ModelSize, place: torch.device) -> float:
    """Operations/s of the matrix products of a prefill chunk."""
    turns = cycle(_matrices(size, place))
    device = device_of(place)
    many = _ones(device.prefill_chunk, size.hidden_size, place=place)
    chunk = _seconds(lambda: [device.linear(many, next(turns), None) for _ in range(4)], place)
    return 4 * 2 * device.prefill_chunk * 4 * size.hidden_size**2 / chunk


def _matrices(size: ModelSize, place: torch.device) -> torch.Tensor:
    """About what MLP layers have, ``[n, 4 · hidden, hidden]``."""
    width = size.hidden_size
    return _ones(max(2, _COLD // (2 * 4 * width**2)), 4 * width, width, place=place)


def _kv_bandwidth(size: ModelSize, length: int, place: torch.device) -> float:
    """Bytes/s of keys and values that attention reads for one query token."""
    layer = 2 * size.kv_heads * length * size.head_dim * 2
    kv = _ones(max(2, _COLD // layer), 2, size.kv_heads, length, size.head_dim, place=place)
    query = _ones(size.heads, 1, size.head_dim, place=place)
    return kv.nbytes / _seconds(lambda: [attend(query, k, v, 0.1) for k, v in kv], place)


def _layer_overhead(place: torch.device) -> float:
    """Seconds a layer of a model takes that has next to nothing to compute."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # such as the compiled kernels take
    )
    model = LlamaForCausalLM(config).to(place, torch.bfloat16)
    forward = Forward(model, "a tiny model")
    cache = forward.new_cache(64)
    token = torch.zeros(1, dtype=torch.int64)

    def step() -> None:
        forward(token, cache, keep_logits=1)
        cache.rollback(32)

    forward(torch.zeros(32, dtype=torch.int64), cache, keep_logits=1)
    return _seconds(step, place, repeats=50) / _LAYERS


def _ones(*shape: int, place: torch.device) -> torch.Tensor:
    """Written to, since pages that never were are all the same page of zeros."""
    return torch.ones(shape, dtype=torch.bfloat16, device=place)


def _seconds(run: Callable[[], object], place: torch.device, repeats: int = _REPEATS) -> float:
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        run()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        times.append(time.perf_counter() - start)
    return median(times[1:])  # the first warms up


def _load() -> str:
    """How busy the machine was in the last minute: other work makes all rates too low."""
    return f", load average: {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
