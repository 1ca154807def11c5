"""Draft loops and verifications: the same code, uncaptured, on a CPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from uncaptured import (
    CLOSE,
    HERE,
    IDS,
    ON_A_CPU,
    SAMPLINGS,
    VOCABULARY,
    WAYS,
    assert_same_kv,
    spoilt,
)

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.engine.cuda.graphs import MAX_TOKENS
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.session import Session
from rapid_llm.speculation.acceptance import dynamic_eta
from rapid_llm.speculation.sampling import Fit, Sampler
from rapid_llm.speculation.verification import Judge, Verdict, verify

pytestmark = ON_A_CPU


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
