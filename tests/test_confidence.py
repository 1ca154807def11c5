"""How sure a retrieval was, and what a dynamic η makes of it."""

from __future__ import annotations

import pytest
from conftest import tiny_model, tiny_tokenizer

from rapid_llm import InvalidParameterError, RapidDecoder, SamplingParams, SpeculationConfig
from rapid_llm.context.confidence import HIGH, LOW, confidence

PROMPT, DRAFT_PROMPT = [5, 9, 31, 7, 44, 12, 8, 30, 21, 17, 60, 3], [31, 7, 44, 3]
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([], 0),
        ([LOW - 0.5], 0),
        ([LOW], 0),
        ([0.1, (LOW + HIGH) / 2, -1], 0.5),
        ([HIGH], 1),
        ([1.0, 0.2], 1),
    ],
)
def test_the_best_similarity_counts(scores, expected):
    assert confidence(scores) == pytest.approx(expected)


def answer(confidence: float = 1.0, **options):
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer(), tiny_model(seed=1))
    config = SpeculationConfig(gamma=3, **options)
    return decoder.generate(
        PROMPT, DRAFT_PROMPT, sampling=GREEDY, speculation=config, confidence=confidence
    )


def test_without_confidence_nothing_is_transferred():
    exact = answer(mode="exact")
    dynamic = answer(0.0, eta=40.0, dynamic_eta=True)
    assert dynamic.token_ids == exact.token_ids
    assert dynamic.stats.accepted_tokens == exact.stats.accepted_tokens
    assert answer(0.0, eta=40.0).token_ids != exact.token_ids  # a static η does not listen


def test_confidence_is_a_factor_of_eta(monkeypatch):
    used = []

    def spy(s, q, draft, config, eta):
        used.append(eta)
        return verify(s, q, draft, config, eta)

    import rapid_llm.speculation.verification as verification_module

    verify = verification_module.verify_greedy
    monkeypatch.setattr(verification_module, "verify_greedy", spy)
    result = answer(0.5, eta=40.0, dynamic_eta=True)
    values = [eta[:, 0].tolist() for eta in used]
    assert values[0] == pytest.approx([20 * 2 ** (-t / 32) for t in range(3)])
    start = [value[0] for value in values if value]
    assert start == sorted(start, reverse=True)
    assert len(used) == result.stats.rounds


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_confidence_outside_its_range_is_refused(value):
    with pytest.raises(InvalidParameterError, match=r"confidence=.* within \[0, 1\]"):
        answer(value)


def test_dynamic_eta_is_a_switch():
    assert not SpeculationConfig().dynamic_eta
    with pytest.raises(InvalidParameterError, match="dynamic_eta=1 "):
        SpeculationConfig(dynamic_eta=1)
