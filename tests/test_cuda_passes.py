"""Captured passes: the same code, uncaptured, on a CPU in Triton's interpreter."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from torch import nn
from uncaptured import CLOSE, HERE, IDS, ON_A_CPU, Live, assert_same_kv, spoilt

from rapid_llm.engine.cuda import graphs
from rapid_llm.engine.cuda.fused import fuse
from rapid_llm.engine.cuda.graphs import MAX_TOKENS
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.session import Session
from rapid_llm.errors import OutdatedKVError

pytestmark = ON_A_CPU

FAMILY = [name for name in ARCHITECTURES if ModelRunner(tiny_model(name), name).lean]


@pytest.mark.parametrize("architecture", FAMILY)
@torch.inference_mode()
def test_passes_of_any_few_tokens_give_what_the_lean_pass_gives(live, architecture):
    model = tiny_model(architecture)
    plain, ours = ModelRunner(model, "plain", cuda_graphs=False), ModelRunner(model, "captured")
    expected, cache = spoilt(plain, IDS[:8]), spoilt(ours, IDS[:8])
    for first, last in ((8, 9), (9, 10), (10, 14)):
        tokens = IDS[first:last]
        logits = ours(tokens, cache, len(tokens))
        torch.testing.assert_close(logits, plain(tokens, expected, len(tokens)), **CLOSE)
    assert live.made == 2  # one for each number of tokens
    assert_same_kv(cache, expected)
    cache.rollback(12)
    expected.rollback(12)
    torch.testing.assert_close(ours(IDS[:2], cache, 1), plain(IDS[:2], expected, 1), **CLOSE)


@torch.inference_mode()
def test_a_pass_of_seventeen_tokens_is_captured_and_one_of_more_is_not(live):
    model = tiny_model()
    plain, ours = ModelRunner(model, "plain", cuda_graphs=False), ModelRunner(model, "captured")
    expected, cache = spoilt(plain, IDS[:8]), spoilt(ours, IDS[:8])
    tokens = IDS[8 : 8 + MAX_TOKENS]
    logits = ours(tokens, cache, MAX_TOKENS)
    torch.testing.assert_close(logits, plain(tokens, expected, MAX_TOKENS), **CLOSE)
    assert live.made == 1
    ours(IDS[: MAX_TOKENS + 1], cache, 1)
    assert live.made == 1


@torch.inference_mode()
def test_one_graph_serves_every_cache_and_a_cache_that_has_grown(live):
    model = tiny_model()
    plain, ours = ModelRunner(model, "plain", cuda_graphs=False), ModelRunner(model, "captured")
    one, other = spoilt(ours, IDS[:8]), spoilt(ours, IDS[20:33], capacity=40)
    first, second = spoilt(plain, IDS[:8]), spoilt(plain, IDS[20:33], capacity=40)
    for token in IDS[40:43].split(1):
        for cache, expected in ((one, first), (other, second)):
            logits = ours(token, cache, 1)
            torch.testing.assert_close(logits, plain(token, expected, 1), **CLOSE)
        other.grow(other.capacity + 3)
    assert live.made == 1
    one.position_offset = first.position_offset = 3
    torch.testing.assert_close(ours(IDS[:1], one, 1), plain(IDS[:1], first, 1), **CLOSE)


@torch.inference_mode()
def test_logits_outlive_the_next_pass(live):
    runner = ModelRunner(tiny_model(), "captured")
    cache = spoilt(runner, IDS[:8])
    runner(IDS[8:9], cache, 1)
    logits = runner(IDS[9:10], cache, 1)
    before = logits.clone()
    runner(IDS[10:11], cache, 1)
    assert torch.equal(logits, before)


@torch.inference_mode()
def test_nothing_is_written_beyond_the_end_of_a_cache(live):
    runner = ModelRunner(tiny_model(), "captured")
    cache = spoilt(runner, IDS[:8], capacity=10)
    with pytest.raises(AssertionError):
        runner(IDS[:3], cache, 1)
    assert cache.length == 8
    assert all(layer.keys[:, :, 8:].isnan().all() for layer in cache.layers)
    runner(IDS[:2], cache, 1)
    assert cache.length == 10


@torch.inference_mode()
def test_a_prompt_is_read_by_the_same_kernels(live):
    model = tiny_model("qwen3")
    plain, ours = ModelRunner(model, "plain", cuda_graphs=False), ModelRunner(model, "captured")
    sessions = [Session(runner, runner.new_cache(64)) for runner in (plain, ours)]
    for session in sessions:
        session.prefill(IDS[:20].tolist())
    assert live.made == 0
    assert_same_kv(sessions[0].cache, sessions[1].cache)


def test_fused_weights_are_stored_once_and_followed():
    linears = [nn.Linear(6, out) for out in (4, 2, 3)]
    weights = [linear.weight for linear in linears]
    before = [weight.detach().clone() for weight in weights]
    together = fuse(weights)
    assert torch.equal(together, torch.cat(before))
    with torch.no_grad():
        weights[1].fill_(7.0)
    assert (together[4:6] == 7).all()
    assert fuse(weights).data_ptr() == together.data_ptr()  # another decoder on the same model
    linears[1](torch.ones(6)).sum().backward()  # still to be trained
    assert weights[1].grad is not None


@torch.no_grad()
def test_a_pass_launched_before_a_change_was_seen_is_not_used(live):
    """The model is looked at while the device works."""
    model = tiny_model()
    runner = ModelRunner(model, "m")
    cache = spoilt(runner, torch.arange(3, 20))
    before = runner(torch.tensor([20]), cache, 1)
    cache.rollback(17)
    made = live.made
    model.model.norm.weight.mul_(2.0)
    with pytest.raises(OutdatedKVError):
        runner(torch.tensor([20]), cache, 1)
    assert cache.length == 17
    session = Session(runner, cache, list(range(3, 20)))
    torch.testing.assert_close(session.extend(torch.tensor([20])), 2 * before)
    assert live.made > made


@torch.inference_mode()
def test_weights_that_change_are_those_that_answer(live):
    model = tiny_model("qwen2")
    plain, ours = ModelRunner(model, "plain", cuda_graphs=False), ModelRunner(model, "captured")
    spoilt(ours, IDS[:8])
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(2.0)
        model.model.layers[1].mlp.up_proj = nn.Linear(32, 48, bias=False)
    # Fusing the new projections moves weights once more, and so outdates what another one has read.
    cache, expected = spoilt(ours, IDS[:8]), spoilt(plain, IDS[:8])
    torch.testing.assert_close(ours(IDS[:3], cache, 3), plain(IDS[:3], expected, 3), **CLOSE)


@torch.inference_mode()
def test_a_precision_that_is_set_later_is_that_of_the_next_pass(live):
    runner = ModelRunner(tiny_model(), "captured")
    cache = spoilt(runner, IDS[:8])
    before = torch.get_float32_matmul_precision()
    try:
        for precision, made in (("highest", 1), ("high", 2), ("highest", 2)):
            torch.set_float32_matmul_precision(precision)
            runner(IDS[8:9], cache, 1)
            assert live.made == made
    finally:
        torch.set_float32_matmul_precision(before)


def test_captures_of_two_models_in_two_threads_take_turns(monkeypatch):
    """All are on one stream, which records whatever is launched there."""
    inside, both_are_inside = [], threading.Event()

    class Slow(Live):
        def __call__(self, run, changes, generator):
            inside.append(self)
            if len(inside) > 1:
                both_are_inside.set()
            both_are_inside.wait(0.1)
            inside.remove(self)
            return run

    monkeypatch.setattr(graphs, "GraphCapture", Slow)
    recorders = [graphs.Recorder(HERE, insist=False) for _ in "ab"]
    threads = [threading.Thread(target=each, args=[IDS.clone, [], None]) for each in recorders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not both_are_inside.is_set()
