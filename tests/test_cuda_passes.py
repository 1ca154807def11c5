"""Captured passes and draft loops: the same code, uncaptured, on a CPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import ARCHITECTURES, counting_model, tiny_model, tiny_tokenizer
from torch import nn

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.forward import Forward
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.session import Session
from rapid_llm.errors import InvalidParameterError, OutdatedKVError
from rapid_llm.speculation.sampling import Fit, Sampler

pytest.importorskip("triton")

from rapid_llm.engine.cpu.device import CPU
from rapid_llm.engine.cuda import captured
from rapid_llm.engine.cuda import device as cuda_device
from rapid_llm.engine.cuda.device import CUDA
from rapid_llm.engine.cuda.fused import fuse
from rapid_llm.engine.cuda.graphs import MAX_TOKENS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has these")

FAMILY = [name for name in ARCHITECTURES if Forward(tiny_model(name), name).lean]
IDS = torch.randint(3, 64, (60,), generator=torch.Generator().manual_seed(1))
HERE = torch.device("cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Live:
    """In the place of a capture: runs anew what would be replayed, into the same memory."""

    made: int

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self, run, changes, generator):
        type(self).made += 1
        out = None

        def replay():
            nonlocal out
            fresh = run()
            out = fresh.clone() if out is None else out.copy_(fresh)
            return out

        return replay


@pytest.fixture
def live(monkeypatch):
    """Forward passes take the CUDA engine's path on a CPU."""
    Live.made = 0
    monkeypatch.setattr(captured, "GraphCapture", Live)
    monkeypatch.setattr(cuda_device, "has_kernels", lambda device: True)
    monkeypatch.setattr(CPU, "passes", CUDA.passes)
    return Live


def spoilt(forward: Forward, tokens: torch.Tensor, capacity: int = 64) -> KVCache:
    """A cache that holds tokens, in buffers that are full of what is no number."""
    cache = forward.new_cache(capacity)
    forward(tokens, cache, keep_logits=1)
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


@pytest.mark.parametrize("architecture", FAMILY)
@torch.inference_mode()
def test_passes_of_any_few_tokens_give_what_the_lean_pass_gives(live, architecture):
    model = tiny_model(architecture)
    plain, ours = Forward(model, "plain", cuda_graphs=False), Forward(model, "captured")
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
    plain, ours = Forward(model, "plain", cuda_graphs=False), Forward(model, "captured")
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
    plain, ours = Forward(model, "plain", cuda_graphs=False), Forward(model, "captured")
    one, other = spoilt(ours, IDS[:8]), spoilt(ours, IDS[20:33], capacity=40)
    first, second = spoilt(plain, IDS[:8]), spoilt(plain, IDS[20:33], capacity=40)
    for token in IDS[40:43].split(1):
        for cache, expected in ((one, first), (other, second)):
            logits = ours(token, cache, 1)
            torch.testing.assert_close(logits, plain(token, expected, 1), **CLOSE)
        other.grow(other.capacity + 3)
    assert live.made == 1
    one.skipped = first.skipped = 3
    torch.testing.assert_close(ours(IDS[:1], one, 1), plain(IDS[:1], first, 1), **CLOSE)


@torch.inference_mode()
def test_logits_outlive_the_next_pass(live):
    forward = Forward(tiny_model(), "captured")
    cache = spoilt(forward, IDS[:8])
    forward(IDS[8:9], cache, 1)
    logits = forward(IDS[9:10], cache, 1)
    before = logits.clone()
    forward(IDS[10:11], cache, 1)
    assert torch.equal(logits, before)


@torch.inference_mode()
def test_nothing_is_written_beyond_the_end_of_a_cache(live):
    forward = Forward(tiny_model(), "captured")
    cache = spoilt(forward, IDS[:8], capacity=10)
    with pytest.raises(AssertionError):
        forward(IDS[:3], cache, 1)
    assert cache.length == 8
    assert all(layer.keys[:, :, 8:].isnan().all() for layer in cache.layers)
    forward(IDS[:2], cache, 1)
    assert cache.length == 10


@torch.inference_mode()
def test_a_prompt_is_read_by_the_same_kernels(live):
    model = tiny_model("qwen3")
    plain, ours = Forward(model, "plain", cuda_graphs=False), Forward(model, "captured")
    sessions = [Session(forward, forward.new_cache(64)) for forward in (plain, ours)]
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
    forward = Forward(model, "m")
    cache = spoilt(forward, torch.arange(3, 20))
    before = forward(torch.tensor([20]), cache, 1)
    cache.rollback(17)
    made = live.made
    model.model.norm.weight.mul_(2.0)
    with pytest.raises(OutdatedKVError):
        forward(torch.tensor([20]), cache, 1)
    assert cache.length == 17
    session = Session(forward, cache, list(range(3, 20)))
    torch.testing.assert_close(session.extend(torch.tensor([20])), 2 * before)
    assert live.made > made


@torch.inference_mode()
def test_weights_that_change_are_those_that_answer(live):
    model = tiny_model("qwen2")
    plain, ours = Forward(model, "plain", cuda_graphs=False), Forward(model, "captured")
    spoilt(ours, IDS[:8])
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(2.0)
        model.model.layers[1].mlp.up_proj = nn.Linear(32, 48, bias=False)
    # Fusing the new projections moves weights once more, and so outdates what another one has read.
    cache, expected = spoilt(ours, IDS[:8]), spoilt(plain, IDS[:8])
    torch.testing.assert_close(ours(IDS[:3], cache, 3), plain(IDS[:3], expected, 3), **CLOSE)


SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, top_k=9, top_p=0.8, seed=2),
]


@pytest.mark.parametrize("params", SAMPLINGS, ids=["greedy", "T=1", "T, top-k and top-p"])
@pytest.mark.parametrize("pending", [1, 2, 5])
@torch.inference_mode()
def test_a_draft_loop_draws_what_single_steps_draw(live, params, pending):
    model = tiny_model()
    plain, ours = Forward(model, "plain", cuda_graphs=False), Forward(model, "captured")
    expected, cache = spoilt(plain, IDS[:8]), spoilt(ours, IDS[:8])
    fit = Fit(66, frozenset([5, 9]), HERE)  # a target of another width, without these tokens
    sampler, stepwise = (Sampler(params, [3], HERE, model) for _ in range(2))
    choice = sampler.choice(fit)
    drafted = Session(ours, cache).draft(IDS[8 : 8 + pending], 3, choice, sampler.generator)
    assert drafted is not None
    tokens, rows = drafted
    unread = IDS[8 : 8 + pending]
    for token, row in zip(tokens, rows, strict=True):
        q = stepwise.scores(fit(plain(unread, expected, 1)), IDS[:0]).softmax(dim=-1)[0]
        torch.testing.assert_close(row, q, **CLOSE)
        unread = stepwise.draw(q)[None]
        assert token == unread
    assert torch.equal(sampler.generator.get_state(), stepwise.generator.get_state())
    assert_same_kv(cache, expected)


@torch.inference_mode()
def test_a_draft_ends_with_the_loop_or_is_left_to_passes_where_there_is_no_room(live):
    forward = Forward(tiny_model(), "captured")
    session = Session(forward, spoilt(forward, IDS[:8]))
    sampler = Sampler(SamplingParams(temperature=1.0), [3], HERE, forward.model)
    choice = sampler.choice(Fit(64, frozenset(), HERE))
    tokens, rows = session.draft(IDS[8:9], 30, choice, sampler.generator)
    assert (len(tokens), len(rows)) == (MAX_TOKENS, MAX_TOKENS)
    assert session.draft(IDS[8:9], 60, choice, sampler.generator) is None


def test_one_loop_serves_every_answer_that_samples_alike():
    model, fit = tiny_model(), Fit(64, frozenset(), HERE)

    def choice(fit=fit, **params):
        return Sampler(SamplingParams(**params), [3], HERE, model).choice(fit)

    alike = [choice(temperature=0.7, top_p=0.8, seed=seed) for seed in (1, 2)]
    assert alike[0] == alike[1]
    assert hash(alike[0]) == hash(alike[1])
    others = [
        choice(),
        choice(temperature=0.7),
        choice(temperature=0.7, top_p=0.8, top_k=5),
        choice(Fit(66, frozenset(), HERE), temperature=0.7, top_p=0.8),
        choice(Fit(64, frozenset([5]), HERE), temperature=0.7, top_p=0.8),
    ]
    assert len({*others, *alike}) == len(others) + 1
    assert choice(repetition_penalty=1.2) is None  # what was said counts


@pytest.mark.parametrize(
    "config",
    [{"mode": "exact", "lookup": False}, {"mode": "augmented", "eta": 5.0}],
    ids=str,
)
def test_answers_are_those_of_the_lean_pass(live, config):
    def decode(graphs):
        decoder = RapidDecoder(model, tiny_tokenizer(), cuda_graphs=graphs)
        return decoder.generate(
            [*range(3, 12)],
            [5, 9, 4],
            sampling=SamplingParams(max_new_tokens=6, ignore_eos=True),
            speculation=SpeculationConfig(gamma=2, **config),
        )

    model = counting_model(0.1)
    plain, ours = decode(False), decode(None)
    assert ours.token_ids == plain.token_ids
    assert ours.stats.accepted_tokens == plain.stats.accepted_tokens
    assert live.made > 0


def test_the_switch_is_automatic_refuses_or_is_off():
    assert Forward(tiny_model(), "on a CPU")._replayed is None
    assert Forward(tiny_model(), "on a CPU", cuda_graphs=False)._replayed is None
    with pytest.raises(InvalidParameterError, match=r"cuda_graphs=True.*m on cpu"):
        Forward(tiny_model(), "m", cuda_graphs=True)


def test_an_embedding_that_asks_for_lengths_is_not_captured(live):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    forward = Forward(tiny_model(rope_parameters=rope), "dynamic")
    assert forward.lean
    assert forward._replayed is None
