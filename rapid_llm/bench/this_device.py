"""Measure the rates of this machine for the speed model, in a few seconds."""

from __future__ import annotations

import os
import time

import torch

from rapid_llm.bench.speed_model import Device, flops, prefill_flops
from rapid_llm.device_maps import resolve_device
from rapid_llm.engine.costs import PassCost, measure
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.session import Session
from rapid_llm.models import device_memory
from rapid_llm.shapes import ModelSize, make_config, random_model, size_of

_COLD = {"cpu": 2**28, "cuda": 2**32}  # bytes of weights, too many for caches and to hide launches
_WIDTH = {"cpu": 2048, "cuda": 2**20}  # width from which on matrices are read at full speed
_LONG = 32_768  # cached tokens from which on attention reads at full speed
_SHORT = 64  # cached tokens of a context whose reading takes no time
_MAX_LAYERS = 32


@torch.inference_mode()
def measure_device(size: ModelSize, context: int) -> Device:
    """Measure the first GPU, or else the CPU, in bf16, by passes of small models.

    The time of each further token is arithmetic. The rest of a pass, without the constant of its
    layers, is reading of weights, and of KV where the context is long. Passes have the heads and
    width of the model, some of its layers, and 2,048 to 32,768 tokens of the context.
    """
    place = resolve_device(None)
    on_gpu = place.type == "cuda"
    # Tiny layers, with a head size that the kernels support, take only their constant time.
    shallow, deep = (_cost(_forward(64, 64, n, 2, 1, 32), _SHORT).first for n in (2, 10))
    layer = max(deep - shallow, shallow / 100) / 8
    once = max(0.0, shallow - 2 * layer)  # constant time of a pass

    width, length = min(size.hidden_size, _WIDTH[place.type]), min(max(context, 2048), _LONG)
    weights = width * (2 * size.head_dim * (size.heads + size.kv_heads) + 12 * width)
    layers = min(max(2, _COLD[place.type] // (2 * weights)), _MAX_LAYERS)
    runner = _forward(width, 4 * width, layers, size.heads, size.kv_heads, size.head_dim)
    small = size_of(runner.config, runner.name)
    short, long = (_cost(runner, tokens) for tokens in (_SHORT, length))
    least = short.first / 10  # noise must not make a difference negative
    reading = max(least, short.first - short.row - layers * layer - once)
    reading_kv = max(least, (long.first - long.row) - (short.first - short.row))
    prefill = _prefill_flops(runner, small)
    load = f", load average: {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    return Device(
        name=torch.cuda.get_device_name(place) if on_gpu else "this CPU",
        bandwidth=small.bytes_read(1, "bf16") / reading,
        kv_bandwidth=small.kv_bytes_per_token * length / reading_kv,
        flops=prefill,
        pass_flops=prefill if on_gpu else flops(small, 1, length) / max(long.row, least / 10),
        memory=device_memory(place),
        # On a GPU draft steps run without the host.
        layer_seconds=layer if on_gpu else layer + once / size.layers,
        round_seconds=once if on_gpu else 0.0,
        is_gpu=on_gpu,
        source=f"measured just now in bf16 (threads: {torch.get_num_threads()}{load})",
    )


def _forward(*shape: int) -> ModelRunner:
    config = make_config("llama", 64, *shape, positions=2 * _LONG)
    return ModelRunner(
        random_model(config, torch.bfloat16, resolve_device(None)), "of random weights"
    )


def _cost(runner: ModelRunner, tokens: int) -> PassCost:
    """Cost of passes after ``tokens`` cached tokens."""
    session, config = Session(runner, runner.new_cache(tokens + _SHORT)), runner.config
    session.prefill([0])
    shape = 1, config.num_key_value_heads, tokens, config.head_dim
    ones = torch.ones(shape, dtype=torch.bfloat16, device=runner.device)
    for layer in session.cache.layers:
        layer.update(ones, ones)
    return measure(session)


def _prefill_flops(runner: ModelRunner, size: ModelSize) -> float:
    """Operations/s of a prefill's first chunk: the best of two runs after a warm-up."""
    tokens, times = runner.prefill_sizes[0], []
    for _ in range(3):
        session = Session(runner, runner.new_cache(tokens))
        started = time.perf_counter()
        session.prefill([0] * tokens)
        runner.synchronize()
        times.append(time.perf_counter() - started)
    return prefill_flops(size, tokens) / min(times[1:])
