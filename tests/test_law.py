"""The law of the output: chi-square tests on whole generations of tiny models.

Outputs of two or three tokens, so that accepted, recovered and bonus tokens all take part. The
last tests alter the residual and the tail test, and see that the chi-square notices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from conftest import threads, tiny_model, tiny_tokenizer
from scipy.stats import chisquare
from torch import Tensor

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.costs import PassCost
from rapid_llm.engine.cpu.int8 import Int8Linear
from rapid_llm.speculation import acceptance
from rapid_llm.speculation.drafters import compressed, rag
from rapid_llm.stats import Stats

VOCAB = 6
SAMPLES, FEWER_SAMPLES = 8_000, 5_000
ETA = 5.0


class Prompts(NamedTuple):
    target: list[int]
    draft: list[int]


SHORT = Prompts([3, 5, 4], [4])
REPETITIVE = Prompts([3, 5, 4, 0, 2, 1, 3, 5, 4, 1, 3, 5], [4, 3, 5, 4, 3])
"""Both end with words that stood before, so that a lookup finds a guess."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose much on a busy machine."""
    with threads(1):
        yield


def make_decoder(**options) -> RapidDecoder:
    shape = {"vocab_size": VOCAB, "num_hidden_layers": 1, "initializer_range": 0.2}
    target, drafter = tiny_model(seed=3, **shape), tiny_model(**shape)
    return RapidDecoder(target, tiny_tokenizer(VOCAB), drafter, **options)


@pytest.fixture(scope="module")
def decoder() -> RapidDecoder:
    return make_decoder()


class Law:
    """Probabilities from the models' own forward passes and the formulas of the paper."""

    def __init__(
        self, decoder: RapidDecoder, temperature: float, eta: float, prompts: Prompts = SHORT
    ) -> None:
        self.decoder, self.temperature, self.eta = decoder, temperature, eta
        self.prompts = prompts

    def _next(self, model: torch.nn.Module, ids: list[int]) -> Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0, -1].double() / self.temperature

    def _scores(self, before: Sequence[int]) -> Tensor:
        return self._next(self.decoder.target.model, [*self.prompts.target, *before])

    def p(self, *before: int) -> Tensor:
        return self._scores(before).softmax(-1)

    def q(self, *before: int) -> Tensor:
        model = self.decoder.draft_runner.model
        return self._next(model, [*self.prompts.draft, *before]).softmax(-1)

    def p_hat(self, *before: int) -> Tensor:
        s = self._scores(before)
        p, q = s.softmax(-1), self.q(*before)
        step = self.eta * (q - p)
        step[q < 0.1 * q.max()] = 0.0
        return (s + step).softmax(-1)

    def paper(self, *before: int) -> Tensor:
        return self.overlap(*before) + self.recovered(*before)

    def overlap(self, *before: int) -> Tensor:
        return torch.minimum(self.q(*before), self.p_hat(*before))

    def recovered(self, *before: int) -> Tensor:
        m, p = self.overlap(*before), self.p(*before)
        residual = torch.maximum(torch.maximum(p - self.p_hat(*before), p - self.q(*before)), 0 * p)
        return (1 - m.sum()) * residual / residual.sum()


def pairs(first: Tensor, second: Callable[[int], Tensor]) -> Tensor:
    """Joint probabilities ``[vocab, vocab]`` from P(a) and a function P(. | a)."""
    return torch.stack([first[a] * second(a) for a in range(VOCAB)])


def triples(law: Callable[..., Tensor]) -> Tensor:
    """Joint probabilities ``[vocab, vocab, vocab]`` from a function P(. | before)."""
    return pairs(law(), lambda a: pairs(law(a), lambda b: law(a, b)))


def expected(law: Law, mode: str, gamma: int) -> Tensor:
    if mode == "exact":
        return pairs(law.p(), law.p)
    if mode == "augmented":
        return pairs(law.p_hat(), law.p_hat)
    if gamma > 1:  # both tokens are judged
        return pairs(law.paper(), law.paper)
    # γ = 1: an accepted token is followed by a bonus from p, a recovered one by a new round.
    return pairs(law.overlap(), law.p) + pairs(law.recovered(), law.paper)


@dataclass
class Run:
    """How often each output was said, ``[vocab, vocab]`` or more, and what it took in all."""

    table: Tensor
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    rounds: int = 0
    plain_rounds: int = 0

    def add(self, tokens: Sequence[int], stats: Stats, plain_rounds: int) -> None:
        self.table[tuple(tokens)] += 1
        self.drafted += stats.drafted_tokens
        self.accepted += stats.accepted_tokens
        self.passes += stats.draft_passes
        self.rounds += stats.rounds
        self.plain_rounds += plain_rounds


def sample(
    decoder: RapidDecoder,
    samples: int,
    prompts: Prompts = SHORT,
    length: int = 2,
    *,
    before: Run | None = None,
    **config,
) -> Run:
    """Answers with so many new seeds, added to those of `before`."""
    run = before or Run(torch.zeros([VOCAB] * length))
    speculation = SpeculationConfig(eta=ETA, **config)
    first = int(run.table.sum())
    for seed in range(first, first + samples):
        sampling = SamplingParams(
            temperature=0.8, max_new_tokens=length, seed=seed, ignore_eos=True
        )
        chunks = list(decoder.stream(*prompts, sampling=sampling, speculation=speculation))
        drafted = [0, *(chunk.stats.drafted_tokens for chunk in chunks)]
        plain = sum(before == after for before, after in pairwise(drafted))
        run.add([t for chunk in chunks for t in chunk.token_ids], chunks[-1].stats, plain)
    return run


def p_value(table: Tensor, law: Tensor) -> float:
    """Chi-square over all pairs, rare ones (fewer than 5 expected) pooled."""
    frequencies, observed = law.flatten() * table.sum(), table.flatten().double()
    rare = frequencies < 5
    f_exp = torch.cat([frequencies[~rare], frequencies[rare].sum()[None]])
    f_obs = torch.cat([observed[~rare], observed[rare].sum()[None]])
    used = f_exp > 0
    f_exp = f_exp * f_obs.sum() / f_exp.sum()
    return float(chisquare(f_obs[used].numpy(), f_exp[used].numpy()).pvalue)


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [1, 2])
@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_outputs_follow_the_modes_law(decoder, mode, gamma):
    law = Law(decoder, 0.8, ETA)
    table = sample(decoder, SAMPLES, mode=mode, gamma=gamma).table
    assert p_value(table, expected(law, mode, gamma)) > 1e-3
    if mode == "paper":  # and it is no other law: the paper's claim that it is p does not hold
        assert p_value(table, expected(law, "exact", gamma)) < 1e-9
        assert p_value(table, expected(law, "augmented", gamma)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_guesses_change_no_law(decoder, mode):
    law = expected(Law(decoder, 0.8, ETA, REPETITIVE), mode, 2)
    run = sample(decoder, FEWER_SAMPLES, REPETITIVE, mode=mode, gamma=2)
    assert p_value(run.table, law) > 1e-3
    look_ahead = run.rounds if mode == "augmented" else 0
    assert run.passes - look_ahead < 0.95 * run.drafted


@pytest.mark.slow
def test_an_int8_drafters_own_distribution_is_what_counts():
    decoder = make_decoder(drafter_quantization="int8")
    assert isinstance(decoder.draft_runner.model.lm_head, Int8Linear)
    law = expected(Law(decoder, 0.8, ETA, REPETITIVE), "augmented", 2)
    run = sample(decoder, FEWER_SAMPLES, REPETITIVE, mode="augmented", gamma=2)
    assert p_value(run.table, law) > 1e-3


@pytest.mark.slow
def test_a_draft_length_that_follows_the_outcome_changes_no_law(decoder, monkeypatch):
    """Costs at which one token is drafted at first, and none after a rejection."""
    monkeypatch.setattr("rapid_llm.generation.pass_cost", lambda session: PassCost(1.0, 0.0))
    monkeypatch.setattr(
        "rapid_llm.speculation.drafters.rag.pass_cost", lambda session: PassCost(0.65, 0.0)
    )
    run = sample(decoder, FEWER_SAMPLES, length=3, mode="exact", gamma="auto")
    assert p_value(run.table, triples(Law(decoder, 0.8, ETA).p)) > 1e-3
    assert 0 < run.accepted < run.drafted
    assert run.plain_rounds > FEWER_SAMPLES / 10


@pytest.mark.slow
def test_a_choice_between_drafters_changes_no_law(decoder, monkeypatch):
    """Costs at which guesses of the target's prompt come first, and the drafter's after them."""
    monkeypatch.setattr("rapid_llm.generation.pass_cost", lambda session: PassCost(1.0, 0.1))
    monkeypatch.setattr(
        "rapid_llm.speculation.drafters.rag.pass_cost", lambda session: PassCost(0.2, 0.0)
    )
    run = sample(decoder, FEWER_SAMPLES, REPETITIVE, length=3, mode="exact", gamma="auto")
    assert p_value(run.table, triples(Law(decoder, 0.8, ETA, REPETITIVE).p)) > 1e-3
    assert 0 < run.passes < run.drafted
    assert 0 < run.accepted < run.drafted


@pytest.mark.slow
@pytest.mark.parametrize("drafting", ["streaming", "triforce", "rest"])
def test_drafting_without_a_context_is_exact(decoder, monkeypatch, drafting):
    monkeypatch.setattr(compressed, "BUDGET", 6)  # of the prompt's 12 tokens
    monkeypatch.setattr(compressed, "_CHUNK", 2)
    run = sample(decoder, FEWER_SAMPLES, REPETITIVE, mode="exact", gamma=2, drafting=drafting)
    law = Law(decoder, 0.8, ETA, REPETITIVE)
    assert p_value(run.table, expected(law, "exact", 2)) > 1e-3
    assert 0 < run.accepted < run.drafted
    assert run.passes < run.drafted  # guesses
    assert (run.passes == 0) == (drafting == "rest")


def broken_residual(base: Tensor, overlap: Tensor) -> Tensor:
    return base


def no_tail_test(s: Tensor, q: Tensor, eta: float, alpha: float) -> Tensor:
    return s + eta * (q - s.softmax(-1))


def tail_test_on_p(s: Tensor, q: Tensor, eta: float, alpha: float) -> Tensor:
    p = s.softmax(-1)
    keep = p >= alpha * p.amax(-1, keepdim=True)
    return s + eta * torch.where(keep, q - p, 0.0)


def full_overlap_residual(base: Tensor, overlap: Tensor) -> Tensor:
    """The residual of `exact` where another mode's is due."""
    return (base.double() - overlap).clamp(min=0).float().square() + 1e-6


@pytest.mark.parametrize(
    ("mode", "name", "altered"),
    [
        ("exact", "residual", broken_residual),
        ("augmented", "residual", broken_residual),
        ("paper", "residual", broken_residual),
        ("exact", "residual", full_overlap_residual),
        ("augmented", "transfer", no_tail_test),
        ("paper", "transfer", no_tail_test),
        ("augmented", "transfer", tail_test_on_p),
        ("paper", "transfer", tail_test_on_p),
    ],
)
def test_an_altered_rule_is_noticed(decoder, monkeypatch, mode, name, altered):
    law = expected(Law(decoder, 0.8, ETA), mode, 2)
    monkeypatch.setattr(acceptance, name, altered)
    assert is_noticed(decoder, law, mode=mode)


def is_noticed(decoder: RapidDecoder, law: Tensor, prompts: Prompts = SHORT, *, mode: str) -> bool:
    """Whether 3,000 answers, or the first of them, do not follow a law."""
    run = None
    for _ in range(10):
        run = sample(decoder, 300, prompts, mode=mode, gamma=2, before=run)
        if p_value(run.table, law) < 1e-5:
            return True
    return False


def test_an_altered_check_of_guesses_is_noticed(decoder, monkeypatch):
    """Guesses that are always believed do not follow q."""

    def believe(q, guess, generator, *, greedy):
        n = len(guess)
        return torch.tensor(n), acceptance.draw(q[n], generator)

    law = expected(Law(decoder, 0.8, ETA, REPETITIVE), "augmented", 2)
    monkeypatch.setattr(rag, "verify_guess", believe)
    assert is_noticed(decoder, law, REPETITIVE, mode="augmented")


@pytest.mark.slow
def test_the_right_rule_is_not_taken_for_an_altered_one(decoder):
    assert not is_noticed(decoder, expected(Law(decoder, 0.8, ETA), "paper", 2), mode="paper")
