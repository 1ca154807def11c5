"""The law of the output on a GPU, by long generations of models without a memory.

Where attention adds nothing, what a model says next depends on its last token only. The law of a
token then depends on the one before it and on its place in the round, and one answer of hundreds
of tokens is as many samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from conftest import tiny_tokenizer
from gpu_models import GRAPHS, cuda_only, exact_products, model_on_device, on_gpu
from torch import Tensor

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.model_runner import ModelRunner

pytestmark = on_gpu

VOCAB = 6
TEMPERATURE, ETA, ALPHA = 0.8, 5.0, 0.1
GAMMA = 3
SAMPLES = 900  # tokens
SHAPE = {"vocab_size": VOCAB, "num_hidden_layers": 1, "initializer_range": 0.2}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "vocab_size": 32}
"""A shape whose matrices four-bit products take."""


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with exact_products():
        yield


def forgetful(seed: int, dtype: torch.dtype = torch.float32, **changes):
    shape = SHAPE | {"max_position_embeddings": 2048} | changes
    model = model_on_device("llama", dtype, seed, **shape)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    return model


def after_each(runner: ModelRunner) -> Tensor:
    """Scaled logits after each token: float64 ``[vocab, vocab]``, on the CPU."""
    rows = []
    with torch.inference_mode():
        for token in range(runner.vocab_size):
            tokens = torch.tensor([token, token])
            rows.append(runner(tokens, runner.new_cache(4), keep_logits=1)[0].double().cpu())
    return torch.stack(rows) / TEMPERATURE


class Law:
    """By the formulas of the paper; every matrix is ``[token before, token]``."""

    def __init__(self, decoder: RapidDecoder) -> None:
        s = after_each(decoder.target)
        self.p, self.q = s.softmax(-1), after_each(decoder.draft_runner).softmax(-1)
        step = ETA * (self.q - self.p)
        step[self.q < ALPHA * self.q.amax(-1, keepdim=True)] = 0.0
        self.p_hat = (s + step).softmax(-1)
        overlap = torch.minimum(self.q, self.p_hat)
        rest = torch.maximum(self.p - self.p_hat, self.p - self.q).clamp(min=0)
        rest /= rest.sum(-1, keepdim=True).clamp(min=1e-12)  # p = q leaves nothing
        self.paper = overlap + (1 - overlap.sum(-1, keepdim=True)) * rest

    def judged(self, mode: str) -> Tensor:
        """Of a token in the place of a drafted one."""
        return {"exact": self.p, "augmented": self.p_hat, "paper": self.paper}[mode]

    def bonus(self, mode: str) -> Tensor:
        """Of the token after a draft that was accepted whole."""
        return self.p_hat if mode == "augmented" else self.p


class Counts:
    """How often a token followed another, where it was judged and where it was the bonus."""

    def __init__(self, vocabulary: int) -> None:
        self.judged, self.bonus = torch.zeros(2, vocabulary, vocabulary, dtype=torch.float64)
        self.drafted = self.accepted = 0

    def add(self, before: int, tokens: Sequence[int], drafted: int) -> None:
        for place, token in enumerate(tokens):
            (self.judged if place < drafted else self.bonus)[before, token] += 1
            before = token


def sample(decoder: RapidDecoder, mode: str, gamma: int = GAMMA, **config) -> Counts:
    counts = Counts(decoder.target.vocab_size)
    per_answer = SAMPLES // 3
    for seed in range(3):
        stream = decoder.stream(
            [3, 5, 4],
            [5, 4],
            sampling=SamplingParams(
                temperature=TEMPERATURE, max_new_tokens=per_answer, seed=seed, ignore_eos=True
            ),
            speculation=SpeculationConfig(
                mode=mode, gamma=gamma, eta=ETA, alpha=ALPHA, lookup=False, **config
            ),
        )
        before, drafted = 4, 0
        for chunk in stream:
            counts.add(before, chunk.token_ids, chunk.stats.drafted_tokens - drafted)
            before, drafted = chunk.token_ids[-1], chunk.stats.drafted_tokens
        counts.drafted += chunk.stats.drafted_tokens
        counts.accepted += chunk.stats.accepted_tokens
    return counts


def p_value(*pairs: tuple[Tensor, Tensor]) -> float:
    """Chi-square of counts ``[before, token]`` given the token before; rare cells are pooled."""
    statistic = freedom = 0.0
    for counts, law in pairs:
        expected = law * counts.sum(-1, keepdim=True)
        for seen, due in zip(counts, expected, strict=True):
            rare = due < 5
            seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
            due = torch.cat([due[~rare], due[rare].sum()[None]])
            if due[-1] < 1:  # too few even together
                seen, due = seen[:-1], due[:-1]
            if len(due) > 1:
                due = due * seen.sum() / due.sum()
                statistic += float(((seen - due) ** 2 / due).sum())
                freedom += len(due) - 1
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def p_of(counts: Counts, law: Law, mode: str) -> float:
    return p_value((counts.judged, law.judged(mode)), (counts.bonus, law.bonus(mode)))


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_tokens_follow_the_modes_law(mode, graphs):
    decoder = RapidDecoder(forgetful(3), tiny_tokenizer(VOCAB), forgetful(0), cuda_graphs=graphs)
    law, counts = Law(decoder), sample(decoder, mode)
    assert 0 < counts.accepted < counts.drafted
    assert p_of(counts, law, mode) > 1e-4
    for other in {"exact", "augmented", "paper"} - {mode}:  # and no other
        assert p_of(counts, law, other) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_follow_their_own_law(dtype):
    decoder = RapidDecoder(forgetful(3, dtype), tiny_tokenizer(VOCAB), forgetful(0, dtype))
    assert p_of(sample(decoder, "augmented"), Law(decoder), "augmented") > 1e-4


def test_plain_tokens_follow_p():
    decoder = RapidDecoder(forgetful(3), tiny_tokenizer(VOCAB))
    stream = decoder.stream(
        [3, 5, 4],
        sampling=SamplingParams(temperature=TEMPERATURE, max_new_tokens=SAMPLES, ignore_eos=True),
    )
    counts = Counts(VOCAB)
    counts.add(4, [token for chunk in stream for token in chunk.token_ids], 0)
    assert p_value((counts.bonus, Law(decoder).p)) > 1e-4


@cuda_only
@pytest.mark.parametrize("mode", ["exact", "augmented"])
def test_an_int4_drafters_own_distribution_is_what_counts(mode):
    models = (forgetful(seed, torch.bfloat16, **WIDE) for seed in (3, 0))
    target, drafter = models
    decoder = RapidDecoder(target, tiny_tokenizer(32), drafter, drafter_quantization="int4")
    counts = sample(decoder, mode)
    assert 0 < counts.accepted < counts.drafted
    assert p_of(counts, Law(decoder), mode) > 1e-4


def test_the_statistic_notices_a_small_difference():
    """That the others could fail: the same counts against a law that is 5 % off."""
    generator = torch.Generator().manual_seed(0)
    law = torch.rand(VOCAB, VOCAB, generator=generator, dtype=torch.float64).softmax(-1)
    counts = torch.stack(
        [
            torch.multinomial(row, SAMPLES, replacement=True, generator=generator).bincount(
                minlength=VOCAB
            )
            for row in law
        ]
    ).double()
    assert p_value((counts, law)) > 1e-3
    altered = law.clone()
    altered[:, 0] += 0.05
    assert p_value((counts, altered / altered.sum(-1, keepdim=True))) < 1e-4
