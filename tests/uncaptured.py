"""The CUDA engine on a CPU: uncaptured, with its kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import installed, tiny_tokenizer

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.cpu.device import CPU
from rapid_llm.engine.cuda import device as cuda_device
from rapid_llm.engine.cuda import graphs
from rapid_llm.engine.cuda.device import CUDA
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.model_runner import ModelRunner

installed("triton")

ON_A_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has these")
IDS = torch.randint(3, 64, (60,), generator=torch.Generator().manual_seed(1))
HERE = torch.device("cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Again:
    """In the place of captured work and of its graph: runs it anew, into the same memory."""

    def __init__(self, run):
        self.graph, self.run, self.result = self, run, None

    def replay(self):
        Live.launched += 1
        fresh = self.run()
        self.result = fresh.clone() if self.result is None else self.result.copy_(fresh)


class Live:
    """In the place of a capture."""

    made: int
    launched: int

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self, run, changes, generator):
        Live.made += 1
        return Again(run)


def take_the_place_of_captures(monkeypatch: pytest.MonkeyPatch) -> type[Live]:
    """Forward passes take the CUDA engine's path on a CPU."""
    Live.made = Live.launched = 0
    monkeypatch.setattr(graphs, "GraphCapture", Live)
    monkeypatch.setattr(cuda_device, "has_kernels", lambda device: True)
    monkeypatch.setattr(CPU, "passes", CUDA.passes)
    return Live


def spoilt(runner: ModelRunner, tokens: torch.Tensor, capacity: int = 64) -> KVCache:
    """A cache that holds tokens, in buffers that are full of what is no number."""
    cache = runner.new_cache(capacity)
    runner(tokens, cache, keep_logits=1)
    for layer in cache.layers:
        layer.keys[:, :, layer.length :] = torch.nan
        layer.values[:, :, layer.length :] = torch.nan
    return cache


def assert_same_kv(ours: KVCache, theirs: KVCache) -> None:
    assert ours.length == theirs.length
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        for buffer in ("keys", "values"):
            held = (getattr(layer, buffer)[:, :, : ours.length] for layer in (one, other))
            torch.testing.assert_close(*held, **CLOSE)


SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, top_k=9, top_p=0.8, seed=2),
]


WAYS = {
    "exact": SpeculationConfig(mode="exact"),
    "augmented": SpeculationConfig(mode="augmented", eta=5.0),
    "paper": SpeculationConfig(mode="paper", eta=20.0, alpha=0.3),
    "paper, dynamic": SpeculationConfig(mode="paper", eta=40.0, dynamic_eta=True),
}


VOCABULARY = 64


def decode(model, graphs=None, gamma=3, sampling=None, drafter=(), prompts=None, **config):
    decoder = RapidDecoder(model, tiny_tokenizer(), *drafter, cuda_graphs=graphs)
    config = {"lookup": False} | config
    return decoder.generate(
        *(prompts or ([*range(3, 12)], [5, 9, 4])),
        sampling=SamplingParams(**({"max_new_tokens": 6, "ignore_eos": True} | (sampling or {}))),
        speculation=SpeculationConfig(gamma=gamma, **config),
        confidence=0.5,
    )
