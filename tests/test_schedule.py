"""How many tokens a round drafts: the speed model, what is learned, what costs are measured."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import counting_model, tiny_model, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import betaln

import rapid_llm.engine.costs as costs
from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.costs import PassCost, pass_cost
from rapid_llm.engine.cpu.int8 import Int8Linear
from rapid_llm.engine.cpu.quantizers import quantized_copy
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.session import Session
from rapid_llm.speculation.schedule import (
    GUESS,
    MAX_GAMMA,
    MODEL,
    AdaptiveSchedule,
    FixedSchedule,
    Prior,
    believed_tokens,
    expected_tokens,
)

TARGET = PassCost(1.0, 0.05)
CHEAP, FAIR, DEAR = PassCost(0.1, 0.005), PassCost(0.3, 0.005), PassCost(2.0, 0.1)

seconds = st.floats(1e-3, 10)
rates = st.floats(0, 1)


@given(a=st.floats(0, 0.999), gamma=st.integers(0, MAX_GAMMA))
def test_a_round_yields_the_formulas_tokens(a, gamma):
    assert expected_tokens(a, gamma) == pytest.approx((1 - a ** (gamma + 1)) / (1 - a))
    assert expected_tokens(1, gamma) == gamma + 1


@given(a=st.floats(0.01, 0.99), trials=st.floats(0.5, 200))
def test_what_is_believed_is_the_mean_over_a_beta_distribution(a, trials):
    believed = list(islice(believed_tokens(a * trials, trials), MAX_GAMMA))
    yes, no = a * trials, (1 - a) * trials
    moments = np.exp(betaln(yes + np.arange(MAX_GAMMA + 1), no) - betaln(yes, no))
    assert believed == pytest.approx(np.cumsum(moments)[1:], rel=1e-6)
    for gamma, tokens in enumerate(believed, start=1):  # a convex function of a
        assert tokens >= expected_tokens(a, gamma) * (1 - 1e-9)
    certain = list(islice(believed_tokens(a * 1e9, 1e9), MAX_GAMMA))
    assert certain == pytest.approx([expected_tokens(a, g) for g in range(1, MAX_GAMMA + 1)])


@given(first=seconds, row=seconds, tokens=st.integers(1, 20))
def test_a_pass_costs_its_first_row_and_the_others(first, row, tokens):
    assert PassCost(first, row).seconds(1) == first
    assert PassCost(first, row).seconds(tokens) == pytest.approx(first + (tokens - 1) * row)


def test_a_fixed_schedule_is_fixed():
    schedule = FixedSchedule(7)
    schedule.record(7, 0, 7)
    assert [schedule.next(0) for _ in range(3)] == [7, 7, 7]


# --- what is learned -------------------------------------------------------------------------


def steady(schedule: AdaptiveSchedule, gamma: int, accepted: int, rounds: int = 60) -> int:
    """The next γ after many equal rounds of drafts without guesses."""
    for _ in range(rounds):
        schedule.record(gamma, accepted, gamma)
    return schedule.next(0)


def speed(gamma: int, accepted: int, target: PassCost, drafter: PassCost) -> float:
    """Of plain decoding's, by the speed model, after many rounds of which this was accepted of 8.

    The last round counts 0.95 times as much as the next, so that of many twenty count, and a is
    distributed as after so many trials.
    """
    yes, no = 20 * accepted, 20 * (accepted < 8)
    tokens = sum(math.prod((yes + k) / (yes + no + k) for k in range(i)) for i in range(gamma + 1))
    v = target.seconds(gamma + 1) / target.first
    return tokens / (gamma * drafter.first / target.first + v)


@given(target_first=seconds, target_row=st.floats(0, 1), draft=seconds, accepted=st.integers(0, 8))
def test_the_choice_is_the_best_of_all(target_first, target_row, draft, accepted):
    target, drafter = PassCost(target_first, target_row), PassCost(draft, 0.0)
    gamma = steady(AdaptiveSchedule(target, drafter), 8, accepted, rounds=200)
    assert 0 <= gamma <= MAX_GAMMA
    best = max(speed(each, accepted, target, drafter) for each in range(MAX_GAMMA + 1))
    if gamma == 0:
        assert best <= 1.05 * (1 + 1e-3)
    else:  # what was believed at first is all but forgotten, and matters between near equals only
        assert speed(gamma, accepted, target, drafter) == pytest.approx(best, rel=1e-3)


def test_a_first_draft_is_made_where_it_may_pay():
    assert AdaptiveSchedule(TARGET, CHEAP).next(0) > 0
    assert AdaptiveSchedule(TARGET, DEAR).next(0) == 0
    # A draft that costs nothing (lookup) is as long as the verification's rows allow.
    assert AdaptiveSchedule(PassCost(1.0, 0.0), PassCost(0.0, 0.0)).next(0) == MAX_GAMMA


def test_a_rejected_beginning_does_not_stop_drafts():
    # A packaged model's costs at 1,700 tokens, where γ = 4 decodes 1.5 times as fast.
    schedule = AdaptiveSchedule(PassCost(27.5, 0.7), PassCost(12.3, 1.8))
    for _ in range(2):
        gamma = schedule.next(0)
        schedule.record(gamma, 0, gamma)
    assert schedule.next(0) > 0


def speedup_over_plain(answer: str, target: PassCost, drafter: PassCost) -> float:
    """Of an answer of which the drafter would draft the tokens marked ``+``, by the costs."""
    schedule = AdaptiveSchedule(target, drafter)
    said = drafted = 0
    spent = 0.0
    while said < len(answer):
        lag = max(0, said - drafted)
        gamma = min(schedule.next(lag), len(answer) - said)
        if gamma > 0:
            drafted = said + gamma
            spent += gamma * drafter.first + lag * drafter.row
        accepted = len(re.match(r"\+*", answer[said : said + gamma])[0])
        spent += target.seconds(gamma + 1)
        said += accepted + 1
        schedule.record(gamma, accepted, gamma)
    return len(answer) * target.first / spent


AVX2 = PassCost(24.0, 4.8), PassCost(6.3, 1.6)
"""Milliseconds of the packaged model's passes at 7,500 tokens, with a 4-bit drafter."""


def test_a_streak_of_failures_is_outlasted():
    # As measured of a summary: what the drafter says fits after some twenty tokens.
    answer = "++++-+------+-++++-+++++++-++++-" + 14 * "+" + "--" + 16 * "+"
    assert speedup_over_plain(answer, *AVX2) > 1.1


def test_an_answer_that_no_draft_fits_costs_few_steps():
    for length in (64, 256):
        plain_steps = length / speedup_over_plain(length * "-", *AVX2)
        assert 1 < plain_steps - length < 4


def test_the_draft_grows_with_the_acceptance():
    chosen = [steady(AdaptiveSchedule(TARGET, CHEAP), 8, accepted) for accepted in range(9)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    assert chosen[8] == MAX_GAMMA
    assert len(set(chosen)) > 4


@given(cost=seconds, cheaper=st.floats(0.01, 1), accepted=st.integers(0, 8))
def test_a_cheaper_drafter_drafts_no_less(cost, cheaper, accepted):
    dear, cheap = (
        steady(AdaptiveSchedule(TARGET, PassCost(first, 0.0)), 8, accepted)
        for first in (cost, cost * cheaper)
    )
    assert cheap >= dear


def test_passes_saved_by_lookup_count():
    """A drafter as dear as the target pays where a pass checks four guesses."""
    guessing, plain = (AdaptiveSchedule(TARGET, TARGET) for _ in range(2))
    for _ in range(60):
        guessing.record(8, 8, 2)
        plain.record(8, 8, 8)
    assert plain.next(0) == 0
    assert guessing.next(0) > 0


def test_drafts_without_a_single_pass_stay_the_longest():
    schedule = AdaptiveSchedule(PassCost(1.0, 0.0), PassCost(0.0, 0.0))
    for _ in range(10_000):  # so many that no trace of a pass is left in a float
        assert schedule.next(0) == MAX_GAMMA
        schedule.record(MAX_GAMMA, MAX_GAMMA, 0)


def test_an_empty_draft_teaches_nothing():
    schedule, other = (AdaptiveSchedule(TARGET, CHEAP) for _ in range(2))
    for _ in range(100):
        schedule.record(0, 0, 0)
    for _ in range(10):
        for one in (schedule, other):
            one.record(5, 2, 5)
        schedule.record(0, 0, 1)  # a pass for the distribution after an empty draft
        assert schedule.next(0) == other.next(0)


def plain_rounds(schedule: AdaptiveSchedule, probes: int, accepted: int = 0) -> list[int]:
    """Plain rounds before each probe, at most 1000; a probe goes as told."""
    waits, lag = [], 0
    while len(waits) < probes and lag < 1000:
        gamma = schedule.next(lag)
        schedule.record(gamma, min(gamma, accepted), gamma)
        if gamma == 0:
            lag += 1
        else:
            assert gamma == 1
            waits, lag = [*waits, lag], 0
    return waits


def test_probes_take_a_32nd_of_the_time_of_plain_rounds():
    target = PassCost(1.0, 0.05)
    for first, row in ((2.0, 0.0), (0.3, 0.01), (0.0, 0.0)):
        schedule = AdaptiveSchedule(target, PassCost(first, row))
        assert steady(schedule, 8, 0) == 0
        # A pass over one token and over what was missed, and a row more to verify.
        wait = math.ceil((first + target.row) / (1 / 32 - row))
        assert plain_rounds(schedule, 3) == [wait] * 3


def test_where_a_drafter_would_have_to_read_too_much_it_is_not_probed():
    schedule = AdaptiveSchedule(TARGET, PassCost(0.3, 1 / 32))
    assert steady(schedule, 8, 0) == 0
    assert plain_rounds(schedule, 1) == []


def test_what_a_drafter_missed_is_shared_by_its_next_rounds():
    schedule = AdaptiveSchedule(TARGET, CHEAP)
    gammas = [schedule.next(lag) for lag in range(0, 3000, 100)]
    assert gammas[0] > 1
    assert gammas[-1] == 1  # at last a probe only
    speedups = [schedule.speedup(lag) for lag in range(0, 3000, 100)]
    assert speedups == sorted(speedups, reverse=True)
    assert speedups[0] > 1.05
    assert speedups[-1] == 1
    # 4 rounds share it: E / (γ c + v + missed r / 4)
    for lag in (0, 100):
        best = max(
            tokens / (gamma * CHEAP.first + TARGET.seconds(gamma + 1) + lag * CHEAP.row / 4)
            for gamma, tokens in enumerate(islice(believed_tokens(*MODEL), MAX_GAMMA), start=1)
        )
        assert schedule.speedup(lag) == pytest.approx(best)


def test_a_gain_within_the_errors_of_the_costs_is_not_drafted_for():
    """At a = 0.8 and free drafts of one token, E = 1.8."""
    for row, speedup in ((0.7, 1.8 / 1.7), (0.73, 1.0)):
        schedule = AdaptiveSchedule(PassCost(1.0, row), PassCost(0.0, 0.0), Prior(80, 100))
        assert schedule.speedup(0) == pytest.approx(speedup)
        assert schedule.next(0) == (speedup > 1)


def test_a_guess_is_trusted_less_than_a_model():
    model, guess = (AdaptiveSchedule(TARGET, CHEAP, prior) for prior in (MODEL, GUESS))
    assert 0 < guess.next(0) < model.next(0)


def test_probes_find_out_when_drafting_pays_again():
    schedule = AdaptiveSchedule(TARGET, CHEAP)
    assert steady(schedule, 8, 0) == 0
    drafted, lag = [], 0
    for _ in range(200):
        gamma = schedule.next(lag)
        schedule.record(gamma, gamma, gamma)
        lag = 1 if gamma else lag + 1
        drafted.append(gamma)
    assert 0 in drafted[:5]
    assert min(drafted[-20:]) > 2


@given(
    st.lists(st.tuples(*[st.integers(0, 16)] * 3, st.integers(0, 500)), max_size=50),
)
def test_any_history_gives_an_allowed_length(rounds: Sequence[tuple[int, int, int, int]]):
    schedule, again = (AdaptiveSchedule(TARGET, CHEAP) for _ in range(2))
    for drafted, accepted, passes, lag in rounds:
        for one in (schedule, again):
            one.record(drafted, min(drafted, accepted), max(1, min(drafted, passes)))
        gamma = schedule.next(lag)
        assert 0 <= gamma <= MAX_GAMMA
        assert again.next(lag) == gamma


# --- costs -----------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """The rows of each forward pass."""
    rows: list[int] = []
    original = ModelRunner.__call__

    def spy(runner, tokens, cache, *args):
        rows.append(len(tokens))
        return original(runner, tokens, cache, *args)

    monkeypatch.setattr(ModelRunner, "__call__", spy)
    return rows


@torch.inference_mode()
def session_of(runner: ModelRunner, length: int, capacity: int = 500) -> Session:
    session = Session(runner, runner.new_cache(capacity))
    session.prefill([5 + i % 50 for i in range(length)])
    return session


def test_costs_are_measured_once_for_lengths_within_a_factor(measured):
    runner = ModelRunner(tiny_model(), "tiny")
    first = session_of(runner, 100)
    measured.clear()
    with torch.inference_mode():
        cost = pass_cost(first)
        assert sorted(measured) == [1] * 10 + [5] * 10
        assert pass_cost(first) is cost
        assert pass_cost(session_of(runner, 105)) is cost
        measured.clear()
        assert pass_cost(session_of(ModelRunner(runner.model, "again"), 100)) is cost
        assert measured == [100]  # the prefill
        for session in (
            session_of(runner, 145),  # √2 longer
            session_of(ModelRunner(tiny_model(hidden_size=64), "wider"), 100),
            session_of(ModelRunner(tiny_model().bfloat16(), "another dtype"), 100),
            session_of(ModelRunner(quantized_copy(runner.model, Int8Linear), "quantized"), 100),
            session_of(ModelRunner(runner.model, "tiny", "sdpa"), 100),
        ):
            measured.clear()
            assert pass_cost(session) is not cost
            assert len(measured) == 20
        measured.clear()
        assert pass_cost(session_of(ModelRunner(tiny_model(seed=1), "other weights"), 100)) is cost
        assert measured == [100]


def test_measuring_leaves_the_session_as_it_was(measured):
    runner = ModelRunner(tiny_model(), "tiny")
    session = session_of(runner, 60)
    with torch.inference_mode():
        before = [layer.keys[:, :, :60].clone() for layer in session.cache.layers]
        pass_cost(session)
        assert measured[-1] in (1, 5)
        assert session.length == 60
        for layer, keys in zip(session.cache.layers, before, strict=True):
            assert torch.equal(layer.keys[:, :, :60], keys)
        next_token = torch.tensor([9])
        again = session_of(runner, 60).extend(next_token)
        assert torch.equal(session.extend(next_token), again)


@pytest.mark.parametrize("times", [(2.0, 1.0), (1.0, 3.0)], ids=["noise", "rows cost"])
def test_a_row_never_costs_less_than_nothing(monkeypatch, times):
    clock = iter([at for took in times * 10 for at in (0, took)])
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
    with torch.inference_mode():
        cost = costs.measure(session_of(ModelRunner(tiny_model(), "tiny"), 20))
    assert cost == PassCost(times[0], max(0.0, (times[1] - times[0]) / 4))


def test_the_least_of_a_few_measurements_counts(monkeypatch):
    one, five = (3, 1, 2, 4, 2) * 2, (9, 5, 7, 8, 6) * 2  # seconds of the passes, in turns
    clock = iter([at for pair in zip(one, five, strict=True) for took in pair for at in (0, took)])
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
    with torch.inference_mode():
        cost = costs.measure(session_of(ModelRunner(tiny_model(), "tiny"), 20))
    assert cost == PassCost(1, (5 - 1) / 4)


def test_joined_passes_cost_what_those_of_several_sequences_on_one_document_do(monkeypatch):
    clock = iter([at for took in (2.0, 5.2) * 10 for at in (0, took)])
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
    runner = ModelRunner(tiny_model(), "tiny")
    session, seen = session_of(runner, 20), set()
    session.joined, session.cache.position_offset = True, 7  # as a compressed drafter's
    joined = ModelRunner.joined

    def spy(self, parts):
        seen.add((len(parts), *{part.cache.prefix for part in parts}, parts[0].position))
        return joined(self, parts)

    monkeypatch.setattr(ModelRunner, "joined", spy)
    with torch.inference_mode():
        cost = costs.measure(session)
    assert seen == {(8, session.cache.segments(20), 27)}
    assert cost.seconds(8) == pytest.approx(2.0)
    assert cost.seconds(40) == pytest.approx(5.2)
    seen.clear()  # which has held the borrowers' segments
    assert (session.length, session.cache.lent) == (27, 0)


def test_the_least_answer_leaves_room_to_measure(measured):
    """So that what is kept does not depend on how many tokens the first call asked for."""
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    decoder.generate(PROMPT, DRAFT_PROMPT, sampling=SamplingParams(max_new_tokens=1))
    assert measured.count(5) >= 20


# --- kept for every process ------------------------------------------------------------------


def in_another_process(monkeypatch, runner: ModelRunner, length: int = 20) -> PassCost:
    """What is remembered is what the files say."""
    monkeypatch.setattr(costs, "_known", {})
    with torch.inference_mode():
        return pass_cost(session_of(runner, length))


def files() -> list[Path]:
    return sorted((costs.cache_folder() / "pass-costs").iterdir())


def test_another_process_takes_the_costs_that_the_first_has_measured(monkeypatch, measured):
    runner = ModelRunner(tiny_model(), "tiny")
    cost = in_another_process(monkeypatch, runner)
    assert len(measured) == 21
    measured.clear()
    assert in_another_process(monkeypatch, ModelRunner(tiny_model(seed=3), "tiny")) == cost
    assert measured == [20]
    assert len(files()) == 1


def test_of_two_that_measure_at_once_the_first_to_write_counts(monkeypatch):
    runner = ModelRunner(tiny_model(), "tiny")
    measure, first = costs.measure, PassCost(3.0, 1.0)

    def meanwhile(session: Session) -> PassCost:
        monkeypatch.setattr(costs, "measure", lambda session: first)
        assert in_another_process(monkeypatch, runner) == first
        return measure(session)

    monkeypatch.setattr(costs, "measure", meanwhile)
    assert in_another_process(monkeypatch, runner) == first
    assert len(files()) == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1, 2]",
        '{"first": 1.0}',
        '{"first": "x", "row": 0.0}',
        '{"first": NaN, "row": 0.0}',
        '{"first": 0.0, "row": 0.0}',
        '{"first": 1.0, "row": -1.0}',
        '{"first": 1.0, "second": 2.0}',
    ],
)
def test_a_damaged_file_is_named_once_and_not_used(monkeypatch, content):
    runner = ModelRunner(tiny_model(), "tiny")
    in_another_process(monkeypatch, runner)
    (path,) = files()
    path.write_text(content)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            assert in_another_process(monkeypatch, runner).first > 0
    assert [str(path.parent) in str(one.message) for one in warned] == [True]


def test_a_folder_that_cannot_be_written_to_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAPID_LLM_CACHE", str(tmp_path / "file"))
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    sampling = SamplingParams(max_new_tokens=20)
    with pytest.warns(UserWarning, match="set RAPID_LLM_CACHE to a writable folder"):
        first = decoder.generate(PROMPT, DRAFT_PROMPT, sampling=sampling)
    again = decoder.generate(PROMPT, DRAFT_PROMPT, sampling=sampling)
    assert first.token_ids == again.token_ids


def test_costs_are_kept_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("RAPID_LLM_CACHE", str(tmp_path / "own"))
    assert costs.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("RAPID_LLM_CACHE")
    assert costs.cache_folder() == tmp_path / "xdg" / "rapid-llm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert costs.cache_folder() == tmp_path / ".cache" / "rapid-llm"


# --- in a decoder ----------------------------------------------------------------------------


PROMPT, DRAFT_PROMPT = [5, 9, 31, 7, 44, 12, 8, 30, 21, 17, 60, 3], [31, 7, 44, 3]


def decode(monkeypatch, target: PassCost, drafter: PassCost, draft_prompt=DRAFT_PROMPT, **config):
    """An exact answer of 120 tokens whose costs are those given."""
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer(), tiny_model())
    monkeypatch.setattr("rapid_llm.generation.pass_cost", lambda session: target)
    monkeypatch.setattr("rapid_llm.speculation.drafters.rag.pass_cost", lambda session: drafter)
    return decoder.generate(
        PROMPT,
        draft_prompt,
        sampling=SamplingParams(max_new_tokens=120, ignore_eos=True),
        speculation=SpeculationConfig(mode="exact", **config),
    )


def test_a_drafter_that_never_pays_leaves_plain_decoding_with_rare_probes(monkeypatch):
    plain = RapidDecoder(tiny_model(), tiny_tokenizer()).generate(
        PROMPT, sampling=SamplingParams(max_new_tokens=120, ignore_eos=True)
    )
    # A pass over what was missed takes a 32nd of the time after 84 plain rounds, or never does.
    for dear, drafted in ((PassCost(2.5, 0.0), 1), (DEAR, 0)):
        result = decode(monkeypatch, TARGET, dear, lookup=False)
        assert result.token_ids == plain.token_ids
        assert result.stats.drafted_tokens == drafted
        assert result.stats.rounds >= 119


def test_a_drafter_that_is_always_right_drafts_longer_and_longer(monkeypatch):
    agreeing = decode(monkeypatch, TARGET, CHEAP, PROMPT)
    differing = decode(monkeypatch, TARGET, CHEAP)
    assert agreeing.token_ids == differing.token_ids
    assert agreeing.stats.acceptance_rate == 1
    assert agreeing.stats.rounds < 15
    assert agreeing.stats.tokens_per_round > differing.stats.tokens_per_round


def quoting(monkeypatch, drafter: PassCost, **config):
    """The target's prompt tells what it will say, the drafter's does not."""
    decoder = RapidDecoder(counting_model(), tiny_tokenizer(), tiny_model())
    monkeypatch.setattr("rapid_llm.generation.pass_cost", lambda session: TARGET)
    monkeypatch.setattr("rapid_llm.speculation.drafters.rag.pass_cost", lambda session: drafter)
    result = decoder.generate(
        [*range(3, 64), 3, 4, 5],
        DRAFT_PROMPT,
        sampling=SamplingParams(max_new_tokens=40, ignore_eos=True),
        speculation=SpeculationConfig(**config),
    )
    assert result.token_ids == [*range(6, 46)]
    return result.stats


def test_an_exact_answer_is_also_looked_up_in_the_targets_prompt(monkeypatch):
    stats = quoting(monkeypatch, FAIR, mode="exact")
    assert (stats.acceptance_ratio, stats.draft_passes) == (1, 0)
    assert stats.rounds < 10


@pytest.mark.parametrize("config", [{"lookup": False}, {"gamma": 4}, {"mode": "paper", "eta": 0.0}])
def test_only_an_exact_answer_of_free_draft_length_is(monkeypatch, config):
    stats = quoting(monkeypatch, CHEAP, **({"mode": "exact"} | config))
    assert stats.draft_passes > 0
    assert stats.acceptance_ratio < 0.5


def test_what_fails_gives_way_to_what_succeeds(monkeypatch):
    """The prompt misleads, the drafter is right: guesses of the prompt are soon left alone."""
    prompt = [t for start in range(3, 33) for t in (2, start, start + 1, start + 2)]
    decoder = RapidDecoder(counting_model(), tiny_tokenizer())
    monkeypatch.setattr("rapid_llm.generation.pass_cost", lambda session: TARGET)
    monkeypatch.setattr("rapid_llm.speculation.drafters.rag.pass_cost", lambda session: FAIR)
    result = decoder.generate(
        [*prompt, 2, 3, 4],
        [3, 4],
        sampling=SamplingParams(max_new_tokens=50, ignore_eos=True),
        speculation=SpeculationConfig(mode="exact"),
    )
    assert result.token_ids == [*range(5, 55)]
    stats = result.stats
    assert stats.draft_passes > 10  # the drafter took over
    assert 0 < stats.rejections < 6


@pytest.mark.parametrize("mode", ["paper", "augmented"])
def test_where_a_draft_moves_the_target_every_round_drafts(monkeypatch, mode):
    """However dear it is: without a draft there is no transfer."""
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer(), tiny_model(seed=1))
    monkeypatch.setattr("rapid_llm.generation.pass_cost", lambda session: TARGET)
    monkeypatch.setattr("rapid_llm.speculation.drafters.rag.pass_cost", lambda session: DEAR)

    def stats(**config):
        return decoder.generate(
            PROMPT,
            DRAFT_PROMPT,
            sampling=SamplingParams(max_new_tokens=60, ignore_eos=True),
            speculation=SpeculationConfig(mode=mode, **config),
        ).stats

    moved = stats()
    assert moved.method == "rapid"
    assert moved.draft_skipped is None
    assert moved.drafted_tokens >= moved.rounds > 0
    unmoved = stats(eta=0.0)
    assert unmoved.drafted_tokens == 0
    assert unmoved.method == "lc"
    assert "save time" in unmoved.draft_skipped
