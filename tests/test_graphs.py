"""The single-token step of fixed addresses: without capturing it on a CPU, captured on a GPU."""

from __future__ import annotations

import pytest
import torch
from conftest import ARCHITECTURES, counting_model, tiny_model, tiny_tokenizer

import rapid_llm.engine.forward as forward_module
from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.forward import Forward
from rapid_llm.engine.graphs import GraphedStep, is_capturable
from rapid_llm.engine.kv_cache import KVCache

FAMILY = [name for name in ARCHITECTURES if Forward(tiny_model(name), name).lean]
IDS = torch.randint(3, 64, (24,), generator=torch.Generator().manual_seed(1))
CAPACITY = 32


def run_live(step, device):
    """In the place of a capture."""
    return step


def spoilt(forward: Forward, tokens: torch.Tensor) -> KVCache:
    """A cache that holds tokens, in buffers that were full of what is no number."""
    cache = forward.new_cache(CAPACITY)
    with torch.inference_mode():
        forward(tokens, cache, keep_logits=1)
        for layer in cache.layers:
            layer.keys[:, :, layer.length :] = torch.nan
            layer.values[:, :, layer.length :] = torch.nan
    return cache


@pytest.mark.parametrize("architecture", FAMILY)
@torch.inference_mode()
def test_a_step_of_fixed_addresses_gives_what_a_pass_gives(architecture):
    model = tiny_model(architecture)
    forward = Forward(model, architecture)
    plain, cache = spoilt(forward, IDS[:8]), spoilt(forward, IDS[:8])
    step = GraphedStep(model, cache, run_live)
    for place in range(8, 24):
        token = IDS[place : place + 1]
        torch.testing.assert_close(step(token, cache), forward(token, plain, keep_logits=1))
        assert cache.length == plain.length == place + 1
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.keys[:, :, :24], theirs.keys[:, :, :24])
        torch.testing.assert_close(ours.last_query, theirs.last_query)


@torch.inference_mode()
def test_logits_outlive_the_next_step():
    model = tiny_model()
    cache = spoilt(Forward(model, "m"), IDS[:8])
    out = torch.empty(1, 64)  # a graph writes into the same tensor again and again
    step = GraphedStep(model, cache, lambda step, device: lambda: out.copy_(step()))
    first = step(IDS[8:9], cache)
    before = first.clone()
    step(IDS[9:10], cache)
    assert torch.equal(first, before)


@torch.inference_mode()
def test_rolled_back_and_skipped_positions_count():
    model = tiny_model()
    forward = Forward(model, "m")
    plain, cache = spoilt(forward, IDS[:12]), spoilt(forward, IDS[:12])
    step = GraphedStep(model, cache, run_live)
    step(IDS[20:21], cache)
    cache.rollback(10)
    plain.rollback(10)
    cache.skipped = plain.skipped = 3
    for place in (10, 11):
        token = IDS[place : place + 1]
        torch.testing.assert_close(step(token, cache), forward(token, plain, keep_logits=1))


def test_a_grown_cache_is_another_graph():
    model = tiny_model()
    cache = spoilt(Forward(model, "m"), IDS[:8])
    with torch.inference_mode():
        step = GraphedStep(model, cache, run_live)
        assert step.serves(cache)
        cache.grow(2 * CAPACITY)
    assert not step.serves(cache)


def test_an_embedding_that_asks_for_lengths_is_not_captured():
    model = tiny_model()
    assert is_capturable(model)
    model.model.rotary_emb.rope_type = "dynamic"
    assert not is_capturable(model)


@pytest.fixture
def live(monkeypatch):
    """Forward passes take steps of fixed addresses on a CPU as well."""
    made: list[GraphedStep] = []

    def make(model, cache):
        made.append(GraphedStep(model, cache, run_live))
        return made[-1]

    monkeypatch.setattr(forward_module, "GraphedStep", make)
    return made


def captures(decoder: RapidDecoder) -> RapidDecoder:
    for forward in (decoder.target, decoder.draft_forward):
        forward._captures = True
    return decoder


@pytest.mark.parametrize("config", [{"eta": 10.0}, {"mode": "exact", "lookup": False}], ids=str)
def test_answers_are_the_same_with_steps_of_fixed_addresses(live, config):
    def decode(decoder):
        return decoder.generate(
            [*range(3, 20)],
            [5, 9, 4],
            sampling=SamplingParams(max_new_tokens=30, ignore_eos=True),
            speculation=SpeculationConfig(gamma=3, **config),
        )

    model = counting_model(0.1)
    plain = decode(RapidDecoder(model, tiny_tokenizer(), drafter_quantization="int8"))
    assert not live
    decoder = captures(RapidDecoder(model, tiny_tokenizer(), drafter_quantization="int8"))
    again = decode(decoder)
    assert again.token_ids == plain.token_ids
    assert again.stats.accepted_tokens == plain.stats.accepted_tokens
    assert live


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", FAMILY)
def test_a_captured_step_gives_what_a_pass_gives(architecture):
    model = tiny_model(architecture).to("cuda")
    eager, graphed = (Forward(model, architecture, cuda_graphs=on) for on in (False, True))
    plain, cache = (spoilt(forward, IDS[:8]) for forward in (eager, graphed))
    with torch.inference_mode():
        for place in range(8, 24):
            token = IDS[place : place + 1]
            torch.testing.assert_close(
                graphed(token, cache, keep_logits=1), eager(token, plain, keep_logits=1)
            )
    assert len(graphed._steps) == 1


def test_the_switch_reaches_every_model_and_does_nothing_on_a_cpu():
    options = {"cuda_graphs": True, "drafter_quantization": "int8"}
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer(), tiny_model(), **options)
    for forward in (decoder.target, decoder.drafter, decoder.draft_forward):
        assert (forward.cuda_graphs, forward._captures) == (True, False)
    assert not RapidDecoder(tiny_model(), tiny_tokenizer()).target.cuda_graphs
