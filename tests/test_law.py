"""The law of the output: chi-square tests on whole generations of tiny models.

Two-token outputs, so that accepted, recovered and bonus tokens all take part. The last tests
alter the residual and the tail test, and see that the chi-square notices.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from scipy.stats import chisquare
from torch import Tensor

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.speculation import acceptance

VOCAB = 6
SAMPLES = 20_000
TARGET_PROMPT, DRAFT_PROMPT = [3, 5, 4], [4]
ETA = 5.0


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def decoder() -> RapidDecoder:
    shape = {"vocab_size": VOCAB, "num_hidden_layers": 1, "initializer_range": 0.2}
    return RapidDecoder(tiny_model(seed=3, **shape), tiny_tokenizer(VOCAB), tiny_model(**shape))


class Law:
    """Probabilities from the models' own forward passes and the formulas of the paper."""

    def __init__(self, decoder: RapidDecoder, temperature: float, eta: float) -> None:
        self.decoder, self.temperature, self.eta = decoder, temperature, eta

    def _next(self, model: torch.nn.Module, ids: list[int]) -> Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0, -1].double() / self.temperature

    def p(self, *before: int) -> Tensor:
        return self._next(self.decoder.target.model, [*TARGET_PROMPT, *before]).softmax(-1)

    def q(self, *before: int) -> Tensor:
        return self._next(self.decoder.drafter.model, [*DRAFT_PROMPT, *before]).softmax(-1)

    def p_hat(self, *before: int) -> Tensor:
        s = self._next(self.decoder.target.model, [*TARGET_PROMPT, *before])
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


def pairs(first: Tensor, second) -> Tensor:
    """Joint probabilities ``[vocab, vocab]`` from P(a) and a function P(. | a)."""
    return torch.stack([first[a] * second(a) for a in range(VOCAB)])


def expected(law: Law, mode: str, gamma: int) -> Tensor:
    if mode == "exact":
        return pairs(law.p(), law.p)
    if mode == "augmented":
        return pairs(law.p_hat(), law.p_hat)
    if gamma > 1:  # both tokens are judged
        return pairs(law.paper(), law.paper)
    # γ = 1: an accepted token is followed by a bonus from p, a recovered one by a new round.
    return pairs(law.overlap(), law.p) + pairs(law.recovered(), law.paper)


def counts(decoder: RapidDecoder, samples: int = SAMPLES, seed: int = 0, **config) -> Tensor:
    table = torch.zeros(VOCAB, VOCAB)
    speculation = SpeculationConfig(eta=ETA, **config)
    for i in range(samples):
        sampling = SamplingParams(temperature=0.8, max_new_tokens=2, seed=seed + i, ignore_eos=True)
        result = decoder.generate(
            TARGET_PROMPT, DRAFT_PROMPT, sampling=sampling, speculation=speculation
        )
        first, second = result.token_ids
        table[first, second] += 1
    return table


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
    table = counts(decoder, mode=mode, gamma=gamma)
    assert p_value(table, expected(law, mode, gamma)) > 1e-3
    if mode == "paper":  # and it is no other law: the paper's claim that it is p does not hold
        assert p_value(table, expected(law, "exact", gamma)) < 1e-9
        assert p_value(table, expected(law, "augmented", gamma)) < 1e-9


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
    assert p_value(counts(decoder, 3000, mode=mode, gamma=2), law) < 1e-4
