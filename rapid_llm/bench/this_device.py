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

from rapid_llm.bench.speed_model import Device, ModelSize
from rapid_llm.engine.attention import attend
from rapid_llm.engine.forward import Forward
from rapid_llm.engine.products import linear
from rapid_llm.engine.session import PREFILL_CHUNK
from rapid_llm.models import device_memory, resolve_device

_COLD = 2**28  # bytes: read in turn, they find no cache that holds them
_LONG = 32_768  # cached tokens, from which on attention reads as fast as it ever will
_LAYERS = 8
_REPEATS = 5


@torch.inference_mode()
def measure_device(size: ModelSize, context: int) -> Device:
    """Measure the first GPU, or else the CPU, in bf16; medians of a few runs.

    Args:
        size: a model; attention is timed with its heads, matrix products with its width.
        context: tokens it will hold; attention is timed over so many, up to 32,768.
    """
    place = resolve_device(None)
    bandwidth, flops = _matrix_rates(size, place)
    on_gpu = place.type == "cuda"
    name = torch.cuda.get_device_name(place) if on_gpu else "this CPU"
    kv_bandwidth = _kv_bandwidth(size, min(context, _LONG), place)
    overhead = _layer_overhead(place)
    conditions = "" if on_gpu else f" (threads: {torch.get_num_threads()}{_load()})"
    return Device(
        name=name,
        bandwidth=bandwidth,
        kv_bandwidth=kv_bandwidth,
        flops=flops,
        memory=device_memory(place),
        layer_overhead=overhead,
        overlaps=on_gpu,
        source=f"measured just now in bf16{conditions}: weights are read at {bandwidth / 1e9:,.1f} "
        f"GB/s, KV at {kv_bandwidth / 1e9:,.1f} GB/s, matrix products do {flops / 1e12:,.2f} "
        f"TFLOP/s, a layer takes {overhead * 1e6:.0f} µs beside",
    )


def _matrix_rates(size: ModelSize, place: torch.device) -> tuple[float, float]:
    """Bytes/s of the products of one token, and operations/s of those of a prefill chunk."""
    width = size.hidden_size
    rows = 4 * width  # about what an MLP layer has
    matrices = _ones(max(2, _COLD // (2 * rows * width)), rows, width, place=place)
    one, many = _ones(1, width, place=place), _ones(PREFILL_CHUNK, width, place=place)
    step = _seconds(lambda: [F.linear(one, matrix) for matrix in matrices], place)
    turns = cycle(matrices)
    chunk = _seconds(lambda: [linear(many, next(turns), None) for _ in range(4)], place)
    return matrices.nbytes / step, 4 * 2 * PREFILL_CHUNK * rows * width / chunk


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
        num_attention_heads=4,
        num_key_value_heads=2,
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
