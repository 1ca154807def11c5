"""The law of constrained outputs: chi-square tests on whole answers of tiny models.

The masks of the law are those of a regular expression, found without the grammar library.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

import pytest
import torch
from conftest import installed, threads, tiny_model
from grammar_models import may_follow, piece_tokenizer
from scipy.stats import chisquare
from torch import Tensor

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.speculation import constraints
from rapid_llm.speculation.drafters import compressed

installed("llguidance")

PIECES = ["a", "b", "c", "ab", "d", "e"]
END = len(PIECES)
VOCAB = 8  # the last one has no text
TARGET, DRAFT = [0, 1, 2, 4, 0, 1, 2, 4, 5, 1], [2, 1]
PATTERN = "[ab]{1,3}(de?|c[ab])?|cc"
"""Answers of one to five tokens; some must go on, some may end, some can only end."""

ETA, TEMPERATURE = 5.0, 0.8
SAMPLES, FEWER_SAMPLES = 1_500, 400


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture(scope="module")
def decoder() -> RapidDecoder:
    shape = {"vocab_size": VOCAB, "num_hidden_layers": 1, "initializer_range": 0.2}
    own = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": None}
    target, drafter = tiny_model(seed=3, **shape, **own), tiny_model(**shape, **own)
    return RapidDecoder(target, piece_tokenizer(PIECES), drafter)


class Law:
    """Masked p and q of the models' own forward passes, and the formulas of the paper."""

    def __init__(self, decoder: RapidDecoder, pattern: str, **processors: int) -> None:
        self.decoder, self.pattern, self.top_k = decoder, pattern, processors.get("top_k", 0)
        self._scores = cache(self._scores)

    def legal(self, before: Sequence[int]) -> list[int]:
        return may_follow(self.pattern, PIECES, before)

    def _scores(self, drafter: bool, before: Sequence[int]) -> Tensor:
        runner, ids = self.decoder.target, TARGET
        if drafter:
            runner, ids = self.decoder.drafter, DRAFT
        model = runner.model
        with torch.inference_mode():
            logits = model(torch.tensor([[*ids, *before]])).logits[0, -1].double() / TEMPERATURE
        scores = torch.full_like(logits, float("-inf"))
        legal = self.legal(before)
        scores[legal] = logits[legal]
        if self.top_k and len(legal) > self.top_k:
            scores[scores < scores.topk(self.top_k).values[-1]] = float("-inf")
        return scores

    def p(self, before: Sequence[int]) -> Tensor:
        return self._scores(False, before).softmax(-1)

    def q(self, before: Sequence[int]) -> Tensor:
        return self._scores(True, before).softmax(-1)

    def p_hat(self, before: Sequence[int]) -> Tensor:
        s = self._scores(False, before)
        p, q = s.softmax(-1), self.q(before)
        step = ETA * (q - p)
        step[q < 0.1 * q.max()] = 0.0
        return (s + step).softmax(-1)

    def accepted(self, before: Sequence[int]) -> Tensor:
        return torch.minimum(self.q(before), self.p_hat(before))

    def recovered(self, before: Sequence[int]) -> Tensor:
        p, p_hat, q, m = (each(before) for each in (self.p, self.p_hat, self.q, self.accepted))
        rest = torch.maximum(torch.maximum(p - p_hat, p - q), torch.zeros_like(p))
        return (1 - m.sum()) * rest / rest.sum() if rest.sum() > 0 else 0 * p


Answer = tuple[int, ...]


def answers(law: Law, mode: str, gamma: int, longest: int) -> dict[Answer, float]:
    """Probability of every answer: without the end where nothing else may follow, cut if long."""
    probabilities: Counter[Answer] = Counter()

    def go_on(before: Answer, probability: float, place: int) -> None:
        """``place`` counts tokens of the round that were accepted."""
        if probability == 0:
            return
        over = END in before or len(before) == longest or law.legal(before) == [END]
        if over:
            probabilities[before] += probability
        elif mode != "paper":
            token_law = law.p if mode == "exact" else law.p_hat
            for token, chance in enumerate(token_law(before).tolist()):
                go_on((*before, token), probability * chance, 0)
        elif place == gamma:
            for token, chance in enumerate(law.p(before).tolist()):
                go_on((*before, token), probability * chance, 0)
        else:
            chances = law.accepted(before).tolist(), law.recovered(before).tolist()
            for next_place, each in zip((place + 1, 0), chances, strict=True):
                for token, chance in enumerate(each):
                    go_on((*before, token), probability * chance, next_place)

    go_on((), 1.0, 0)
    return probabilities


def sample(
    decoder: RapidDecoder,
    samples: int,
    pattern: str = PATTERN,
    longest: int = 8,
    top_k: int = 0,
    **config,
) -> Counter[Answer]:
    said: Counter[Answer] = Counter()
    speculation = SpeculationConfig(eta=ETA, **config)
    for seed in range(samples):
        sampling = SamplingParams(
            temperature=TEMPERATURE,
            top_k=top_k,
            max_new_tokens=longest,
            seed=seed,
            constraint=pattern,
        )
        result = decoder.generate(TARGET, DRAFT, sampling=sampling, speculation=speculation)
        said[tuple(result.token_ids)] += 1
    return said


def p_value(said: Counter[Answer], law: dict[Answer, float]) -> float:
    """Chi-square over all answers, rare ones (fewer than 5 expected) pooled."""
    total = said.total()
    assert said.keys() <= law.keys()
    common = [answer for answer, chance in law.items() if chance * total >= 5]
    observed = [float(said[answer]) for answer in common]
    expected = [law[answer] * total for answer in common]
    if (rest := total - sum(expected)) > 1e-3:
        observed.append(total - sum(observed))
        expected.append(rest)
    return float(chisquare(observed, expected).pvalue)


def test_masked_laws_differ_between_modes_and_sum_to_one(decoder) -> None:
    laws = [answers(Law(decoder, PATTERN), mode, 4, 8) for mode in ("exact", "augmented", "paper")]
    for law in laws:
        assert sum(law.values()) == pytest.approx(1)
    exact, *others = laws
    for other in others:
        assert sum(abs(other[answer] - exact[answer]) for answer in exact) > 0.1


@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_constrained_answers_follow_the_masked_law(decoder, mode) -> None:
    said = sample(decoder, FEWER_SAMPLES, mode=mode, gamma=4)
    assert p_value(said, answers(Law(decoder, PATTERN), mode, 4, 8)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_constrained_answers_follow_the_masked_law_of_every_mode(decoder, mode, gamma) -> None:
    said = sample(decoder, SAMPLES, mode=mode, gamma=gamma)
    law = Law(decoder, PATTERN)
    assert p_value(said, answers(law, mode, gamma, 8)) > 1e-3
    if mode != "exact":
        assert p_value(said, answers(law, "exact", gamma, 8)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_the_mask_comes_before_top_k(decoder, mode) -> None:
    law = answers(Law(decoder, PATTERN, top_k=2), mode, 2, 8)
    said = sample(decoder, SAMPLES, top_k=2, mode=mode, gamma=2)
    assert p_value(said, law) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_forced_tokens_change_no_law(decoder, mode) -> None:
    """The grammar forces d, and what follows it."""
    pattern = "[ae][bc]ded[ce]de|bde[abc]"
    said = sample(decoder, SAMPLES, pattern, 10, mode=mode, gamma=3)
    assert p_value(said, answers(Law(decoder, pattern), mode, 3, 10)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("drafting", ["streaming", "triforce", "rest"])
def test_constrained_answers_are_exact_whatever_drafts(decoder, monkeypatch, drafting) -> None:
    monkeypatch.setattr(compressed, "BUDGET", 6)
    monkeypatch.setattr(compressed, "_CHUNK", 2)
    said = sample(decoder, SAMPLES, mode="exact", gamma=2, drafting=drafting)
    assert p_value(said, answers(Law(decoder, PATTERN), "exact", 2, 8)) > 1e-3


def test_a_matcher_that_forgets_to_roll_back_is_noticed(decoder, monkeypatch) -> None:
    """Answers then break the grammar, or cannot go on."""

    def forget(self, kept):
        del self._drafted[kept:], self._rows[kept + 1 :], self._over[kept + 1 :]
        self._read = min(self._read, kept)

    monkeypatch.setattr(constraints.Matcher, "_forget", forget)
    law = answers(Law(decoder, PATTERN), "exact", 4, 8)
    with pytest.raises((AssertionError, ValueError)):  # noqa: PT012
        said = sample(decoder, 300, mode="exact", gamma=4)
        assert p_value(said, law) > 1e-4
