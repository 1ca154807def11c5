"""Captured passes and draft loops: the same code, uncaptured, on a CPU in Triton's interpreter."""

from __future__ import annotations

import threading
from typing import ClassVar

import pytest
import torch
from conftest import ARCHITECTURES, counting_model, installed, tiny_model, tiny_tokenizer
from grammar_models import byte_tokenizer
from torch import nn

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.session import Session
from rapid_llm.errors import InvalidParameterError, NumericalError, OutdatedKVError
from rapid_llm.speculation import constraints
from rapid_llm.speculation.acceptance import dynamic_eta
from rapid_llm.speculation.drafters.rag import RagDrafter
from rapid_llm.speculation.sampling import Fit, Sampler
from rapid_llm.speculation.verification import Judge, Verdict, verify

installed("triton")

from rapid_llm.engine.cpu.device import CPU
from rapid_llm.engine.cuda import device as cuda_device
from rapid_llm.engine.cuda import graphs
from rapid_llm.engine.cuda.device import CUDA
from rapid_llm.engine.cuda.fused import fuse
from rapid_llm.engine.cuda.graphs import MAX_TOKENS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has these")

FAMILY = [name for name in ARCHITECTURES if ModelRunner(tiny_model(name), name).lean]
IDS = torch.randint(3, 64, (60,), generator=torch.Generator().manual_seed(1))
HERE = torch.device("cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Live:
    """In the place of a capture: runs anew what would be replayed, into the same memory."""

    made: int
    launched: int

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self, run, changes, generator):
        Live.made += 1
        out = None

        def replay():
            nonlocal out
            Live.launched += 1
            fresh = run()
            out = fresh.clone() if out is None else out.copy_(fresh)
            return out

        return replay


@pytest.fixture
def live(monkeypatch):
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
    plain, ours = ModelRunner(model, "plain", cuda_graphs=False), ModelRunner(model, "captured")
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
    runner = ModelRunner(tiny_model(), "captured")
    session = Session(runner, spoilt(runner, IDS[:8]))
    sampler = Sampler(SamplingParams(temperature=1.0), [3], HERE, runner.model)
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


WAYS = {
    "exact": SpeculationConfig(mode="exact"),
    "augmented": SpeculationConfig(mode="augmented", eta=5.0),
    "paper": SpeculationConfig(mode="paper", eta=20.0, alpha=0.3),
    "paper, dynamic": SpeculationConfig(mode="paper", eta=40.0, dynamic_eta=True),
}
VOCABULARY = 64


def judged_by_steps(runner, cache, tokens, q, eta, config, sampler):
    """A pass, processors and acceptance, one after the other."""
    logits = runner(tokens, cache, len(tokens))
    s = sampler.scores(logits, tokens[1:])
    draws = None if sampler.params.greedy else sampler.generator
    return verify(logits, s, tokens[1:], q, eta, config, draws)


@pytest.mark.parametrize(
    ("way", "params", "gamma"),
    [
        *((way, params, 2) for way in WAYS for params in SAMPLINGS[:2]),
        *(("paper", SAMPLINGS[2], gamma) for gamma in (0, 2, 16)),
    ],
    ids=str,
)
@torch.inference_mode()
def test_a_verification_says_what_its_steps_say(live, way, params, gamma):
    model, config = tiny_model(num_hidden_layers=1, initializer_range=0.3), WAYS[way]
    ours = ModelRunner(model, "captured")
    expected, cache = spoilt(ours, IDS[:8]), spoilt(ours, IDS[:8])
    sampler, stepwise = (Sampler(params, [3], HERE, model) for _ in range(2))
    judge = Judge.of(sampler, config, VOCABULARY)
    session = Session(ours, cache, IDS[:8].tolist())
    for turn in range(2):
        at = cache.length
        random = torch.Generator().manual_seed(turn)
        tokens = torch.randint(3, VOCABULARY, (gamma + 1,), generator=random)
        rows = gamma + (config.mode == "augmented")
        q = (2 * torch.randn(rows, VOCABULARY, generator=random)).softmax(-1)
        if gamma:  # what the drafter thinks likely, and the target does now and then
            tokens[1:] = q[:gamma].argmax(-1)
        eta = dynamic_eta(config.eta, 0.7, turn, q) if config.dynamic_eta else None
        launched = live.launched
        verdict = session.verify(tokens, q, eta, judge, sampler.generator)
        assert live.launched == launched + 1
        assert cache.length == at + gamma + 1
        assert torch.equal(
            verdict, judged_by_steps(ours, expected, tokens, q, eta, config, stepwise)
        )
        assert torch.equal(sampler.generator.get_state(), stepwise.generator.get_state())
        assert Verdict.read(verdict).drafted == tokens[1:].tolist()
        session.rollback(at + 1)
        expected.rollback(at + 1)
    assert_same_kv(cache, expected)


@torch.inference_mode()
def test_a_verification_is_captured_once_for_each_size_and_way(live):
    runner = ModelRunner(tiny_model(num_hidden_layers=1), "captured")
    session = Session(runner, spoilt(runner, IDS[:8]))

    def judge(**params):
        sampler = Sampler(SamplingParams(**params), [3], HERE, runner.model)
        return Judge.of(sampler, SpeculationConfig(), VOCABULARY), sampler.generator

    def captured_anew(how, gamma, rows, eta=None):
        made = live.made
        q = torch.full((rows, VOCABULARY), 1 / VOCABULARY)
        assert session.verify(IDS[: gamma + 1], q, eta, *how) is not None
        session.rollback(8)
        return live.made - made

    greedy, warm = judge(), judge(temperature=0.7, top_p=0.9)
    assert captured_anew(greedy, 2, 2) == 1
    assert captured_anew(judge(seed=5), 2, 2) == 0
    assert captured_anew(greedy, 2, 3) == 1  # the drafter looked ahead
    assert captured_anew(greedy, 2, 2, torch.ones(2, 1)) == 1
    assert captured_anew(greedy, 0, 0) == 1
    assert captured_anew(warm, 0, 0) == 1
    assert captured_anew(judge(temperature=0.7, top_p=0.9, seed=9), 0, 0) == 0
    for temperature in (0.1, 0.2, 0.3, 0.4):
        assert captured_anew(judge(temperature=temperature), 0, 0) == 1
    assert captured_anew(warm, 0, 0) == 1  # only the latest ways are kept
    assert captured_anew(judge(temperature=0.4), 0, 0) == 0


@torch.no_grad()
def test_what_cannot_be_verified_in_one_launch_is_left_to_passes(live):
    runner = ModelRunner(tiny_model(), "captured")
    cache = spoilt(runner, IDS[:8], capacity=30)
    session = Session(runner, cache, IDS[:8].tolist())
    sampler = Sampler(SamplingParams(temperature=1.0), [3], HERE, runner.model)
    judge = Judge.of(sampler, SpeculationConfig(), VOCABULARY)
    drawn = sampler.generator.get_state()

    def verdict(session, n):
        q = torch.full((n - 1, VOCABULARY), 1 / VOCABULARY)
        return session.verify(IDS[:n], q, None, judge, sampler.generator)

    assert verdict(session, MAX_TOKENS + 1) is None  # too many for a captured pass
    assert verdict(Session(runner, runner.new_cache(30)), 3) is None  # nothing was read
    session.extend(IDS[8:28])
    assert verdict(session, 3) is None  # no room
    session.rollback(8)
    with torch.no_grad():
        runner.model.model.norm.weight.mul_(2.0)
    assert verdict(session, 3) is None  # other weights than those that have read the cache
    assert cache.length == 8
    assert torch.equal(drawn, sampler.generator.get_state())
    assert verdict(session, 3) is None
    session.extend(IDS[8:9])  # reads it again
    assert verdict(session, 3) is not None
    assert (
        Judge.of(
            Sampler(SamplingParams(repetition_penalty=1.2), [3], HERE, runner.model),
            SpeculationConfig(),
            VOCABULARY,
        )
        is None
    )  # what was said counts


@torch.inference_mode()
def test_drafts_and_verifications_use_a_cache_up_to_its_last_token(live):
    runner = ModelRunner(tiny_model(), "captured")
    session = Session(runner, spoilt(runner, IDS[:8], capacity=12), IDS[:8].tolist())
    sampler = Sampler(SamplingParams(), [3], HERE, runner.model)
    choice = sampler.choice(Fit(VOCABULARY, frozenset(), HERE))
    assert session.draft(IDS[8:9], 5, choice, sampler.generator) is None
    assert session.draft(IDS[8:9], 4, choice, sampler.generator) is not None
    assert session.cache.length == 12
    session.rollback(8)
    judge = Judge.of(sampler, SpeculationConfig(), VOCABULARY)
    for n, done in ((5, False), (4, True)):
        q = torch.full((n - 1, VOCABULARY), 1 / VOCABULARY)
        verdict = session.verify(IDS[8 : 8 + n], q, None, judge, sampler.generator)
        assert (verdict is not None) is done
    assert session.cache.length == 12


@torch.inference_mode()
def test_a_model_that_changes_while_it_verifies_answers_as_it_is_now(live, monkeypatch):
    """It is looked at while the device works: draws of what is thrown away are made again."""
    model = tiny_model()
    runner = ModelRunner(model, "captured")
    sampler, stepwise = (
        Sampler(SamplingParams(temperature=1.0, seed=3), [3], HERE, model) for _ in range(2)
    )
    config = SpeculationConfig(mode="exact")
    judge = Judge.of(sampler, config, VOCABULARY)
    q = torch.full((3, VOCABULARY), 1 / VOCABULARY)
    cache = spoilt(runner, IDS[:8])
    # A look that was due already: the pass is launched, then found to be of another number.
    monkeypatch.setattr(runner, "_chosen", -1)
    verdict = Session(runner, cache).verify(IDS[8:12], q, None, judge, sampler.generator)
    assert verdict is not None
    assert cache.length == 12
    fresh = spoilt(runner, IDS[:8])
    expected = judged_by_steps(runner, fresh, IDS[8:12], q, None, config, stepwise)
    assert torch.equal(verdict, expected)
    assert torch.equal(sampler.generator.get_state(), stepwise.generator.get_state())


def decode(model, graphs=None, gamma=3, sampling=None, drafter=(), prompts=None, **config):
    decoder = RapidDecoder(model, tiny_tokenizer(), *drafter, cuda_graphs=graphs)
    config = {"lookup": False} | config
    return decoder.generate(
        *(prompts or ([*range(3, 12)], [5, 9, 4])),
        sampling=SamplingParams(**({"max_new_tokens": 6, "ignore_eos": True} | (sampling or {}))),
        speculation=SpeculationConfig(gamma=gamma, **config),
        confidence=0.5,
    )


@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.8, "top_p": 0.9, "seed": 4},
        {"temperature": 1.0, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "sampled", "penalised"],
)
@pytest.mark.parametrize("way", WAYS)
def test_a_seed_gives_the_answer_that_passes_without_graphs_give(live, way, sampling, gamma):
    config = WAYS[way]
    kind = {"mode": config.mode, "eta": config.eta, "dynamic_eta": config.dynamic_eta}
    model, other = counting_model(0.1), (counting_model(0.3),)
    plain, ours = (
        decode(model, graphs, gamma, sampling, other, **kind) for graphs in (False, None)
    )
    assert ours.token_ids == plain.token_ids
    assert ours.stats.accepted_tokens == plain.stats.accepted_tokens
    assert live.made > 0


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8}], ids=["greedy", "sampled"])
def test_a_round_launches_each_draft_step_and_one_verification(live, sampling):
    model, other = counting_model(0.1), counting_model(0.3)
    sampling = sampling | {"max_new_tokens": 5}
    stats = decode(model, None, 2, sampling, (other,)).stats
    assert live.launched == stats.draft_passes + stats.rounds
    live.launched = 0
    plain = decode(model, None, 2, sampling, prompts=([*range(3, 12)], None)).stats
    assert live.launched == plain.rounds == 5


@pytest.mark.parametrize("broken", ["target", "drafter"])
def test_nan_in_a_captured_round_is_an_error(live, broken):
    models = {"target": tiny_model(), "drafter": tiny_model(seed=1)}
    with torch.no_grad():
        models[broken].lm_head.weight[7] = torch.nan
    for model, name in zip(models.values(), models, strict=True):
        model.name_or_path = f"the {name}"
    with pytest.raises(NumericalError, match=f"the {broken} produced NaN"):
        decode(models["target"], drafter=(models["drafter"],))
    assert live.launched > 0


CUDA_ERROR = RuntimeError("CUDA error: operation would make the legacy stream depend on a capture")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def fail(live, monkeypatch):
    """Lets captures fail, by their numbers: the work was begun, and its draws were made."""

    def fail(error, numbers):
        class Failing(Live):
            tried = 0
            spoilt: ClassVar = set()  # a generator that a capture left behind cannot draw

            def __call__(self, run, changes, generator):
                Failing.tried += 1
                assert generator not in Failing.spoilt
                if Failing.tried not in numbers:
                    return super().__call__(run, changes, generator)
                before = [tensor.clone() for tensor in changes]
                run()
                for tensor, value in zip(changes, before, strict=True):
                    tensor.copy_(value)
                Failing.spoilt |= {generator} - {None}
                raise error

        monkeypatch.setattr(graphs, "GraphCapture", Failing)

    return fail


@pytest.mark.parametrize("error", [CUDA_ERROR, OUT_OF_MEMORY], ids=["CUDA error", "out of memory"])
@pytest.mark.parametrize("numbers", [range(99), range(2, 99, 2)], ids=["all", "every other"])
def test_a_capture_that_fails_costs_no_answer(live, fail, caplog, error, numbers):
    models = counting_model(0.1), counting_model(0.3)
    prompts, sampling = ([*range(3, 12)], [5, 9, 4]), {"temperature": 1.0, "max_new_tokens": 5}
    plain = decode(models[0], False, 2, sampling, models[1:], prompts)
    fail(error, numbers)
    decoder = RapidDecoder(models[0], tiny_tokenizer(), models[1])
    for _ in range(2):
        result = decoder.generate(
            *prompts,
            sampling=SamplingParams(temperature=1.0, max_new_tokens=5, ignore_eos=True),
            speculation=SpeculationConfig(gamma=2, lookup=False),
            confidence=0.5,
        )
        assert result.token_ids == plain.token_ids
        assert result.stats.accepted_tokens == plain.stats.accepted_tokens
    assert (live.launched > 0) == (1 not in numbers)
    if error is CUDA_ERROR or 1 in numbers:  # memory that was short once was there the second time
        told = [record for record in caplog.records if "could not be captured" in record.message]
        assert 1 <= len(told) <= len(models)  # once for each of them


def test_memory_that_a_capture_needs_is_taken_from_kept_kv(live, fail, caplog, monkeypatch):
    monkeypatch.setattr(CPU, "prefill_chunk", MAX_TOKENS + 3)  # no captured pass
    fail(OUT_OF_MEMORY, [2])
    decoder = RapidDecoder(counting_model(), tiny_tokenizer(), kv_cache_bytes=2**20)
    one, four = (SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (1, 4))
    decoder.generate([*range(3, 44)], sampling=one)
    assert decoder.memory.kept_kv > 0
    warmer = SamplingParams(temperature=1e-4, max_new_tokens=4, ignore_eos=True)  # a new capture
    stream = decoder.stream([*range(10, 51)], sampling=warmer)
    said = next(stream).token_ids
    assert decoder.memory.kept_kv == 0
    assert [*said, *(token for chunk in stream for token in chunk.token_ids)] == [51, 52, 53, 54]
    assert decoder.generate([*range(3, 44)], sampling=four).stats.cached_tokens == 0
    assert live.made == 2
    assert not caplog.records


@pytest.mark.parametrize("error", [CUDA_ERROR, OUT_OF_MEMORY], ids=["CUDA error", "out of memory"])
def test_a_capture_that_fails_is_an_error_where_graphs_are_asked_for(live, fail, error):
    fail(error, [1, 2] if error is OUT_OF_MEMORY else [1])
    decoder = RapidDecoder(counting_model(), tiny_tokenizer(), cuda_graphs=True)
    sampling = SamplingParams(max_new_tokens=4, ignore_eos=True)
    with pytest.raises(InvalidParameterError, match=r"cuda_graphs=True.*captured \(CUDA.*leave"):
        decoder.generate([*range(3, 14)], sampling=sampling)
    assert decoder.generate([*range(3, 14)], sampling=sampling).token_ids == [14, 15, 16, 17]
    assert live.launched == 4


def test_the_switch_is_automatic_refuses_or_is_off():
    assert ModelRunner(tiny_model(), "on a CPU")._replayed is None
    assert ModelRunner(tiny_model(), "on a CPU", cuda_graphs=False)._replayed is None
    with pytest.raises(InvalidParameterError, match=r"cuda_graphs=True.*m on cpu"):
        ModelRunner(tiny_model(), "m", cuda_graphs=True)


def test_an_embedding_that_asks_for_lengths_is_not_captured(live):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    runner = ModelRunner(tiny_model(rope_parameters=rope), "dynamic")
    assert runner.lean
    assert runner._replayed is None


GRAMMAR = "[a-c]{2,4}(name|na)[0-9]{1,3}( [a-z]+)?"


def constrained(model, other, graphs, gamma, sampling, constraint=GRAMMAR, **config):
    installed("llguidance")
    tokenizer = byte_tokenizer(["na", "nam", "name"])
    decoder = RapidDecoder(model, tokenizer, other, cuda_graphs=graphs)
    prompts = [tokenizer(text).input_ids for text in ("abc abname12 caname", "caname1 ab")]
    return decoder.generate(
        *prompts,
        sampling=SamplingParams(**{"max_new_tokens": 6, "constraint": constraint} | sampling),
        speculation=SpeculationConfig(gamma=gamma, **config),
    )


@pytest.mark.parametrize(
    ("mode", "sampling", "lookup"),
    [
        ("exact", {}, True),
        ("augmented", {"temperature": 1.0, "top_p": 0.9, "top_k": 7, "seed": 4}, False),
        ("paper", {"temperature": 1.0, "repetition_penalty": 1.3}, False),
    ],
    ids=["exact, greedy, lookup", "augmented, sampled", "paper, penalised"],
)
def test_a_constrained_answer_is_that_of_passes_without_graphs(live, mode, sampling, lookup):
    model, other = (
        tiny_model(vocab_size=280, seed=seed, eos_token_id=259, num_hidden_layers=1)
        for seed in (0, 1)
    )
    want, got = (
        constrained(model, other, graphs, 3, sampling, mode=mode, lookup=lookup)
        for graphs in (False, None)
    )
    assert got.token_ids == want.token_ids
    assert got.stats.accepted_tokens == want.stats.accepted_tokens
    assert live.launched > 0


def test_a_constrained_draft_visits_the_host_once_a_drafted_token(live, monkeypatch):
    visits: list[int] = []
    original = RagDrafter._masks

    def counting(self, drafted):
        masks = original(self, drafted)
        return lambda looped: (visits.append(len(looped)), masks(looped))[1]

    monkeypatch.setattr(RagDrafter, "_masks", counting)
    model = tiny_model(vocab_size=280, eos_token_id=259, num_hidden_layers=1)
    stats = constrained(model, None, None, 3, {}, "[a-z]+", mode="paper", lookup=False).stats
    assert stats.draft_passes > 2
    assert len(visits) == stats.draft_passes


def test_masked_and_unmasked_work_have_graphs_of_their_own(live):
    model = tiny_model(vocab_size=280, eos_token_id=None, num_hidden_layers=1)
    plain = {"max_new_tokens": 5, "ignore_eos": True}
    free = constrained(model, None, None, 3, plain, constraint=None).token_ids
    assert constrained(model, None, None, 3, plain).token_ids != free
    assert constrained(model, None, None, 3, plain, constraint=None).token_ids == free


def test_bits_of_a_mask_are_the_same_by_operators_of_any_device():
    random = torch.Generator().manual_seed(0)
    mask = torch.randint(-(2**31), 2**31, (5, 9), dtype=torch.int32, generator=random)
    for width in (288, 270, 257):
        by_table = torch.from_numpy(constraints._highest(mask.numpy(), width))
        assert torch.equal(constraints._shifted(mask, width), by_table)
