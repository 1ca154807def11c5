"""The acceptance rules as functions: formulas, edge cases, greedy decoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rapid_llm.config import SpeculationConfig
from rapid_llm.speculation import acceptance
from rapid_llm.speculation.acceptance import (
    ETA_HALF_LIFE,
    draw,
    dynamic_eta,
    residual,
    transfer,
    verify_greedy,
    verify_guess,
    verify_sampled,
)

INF = float("inf")
NO_DRAFT = torch.empty(0, dtype=torch.long)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distributions(rows: int, vocab: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(seed)
    s = torch.randn(rows, vocab, generator=generator) * 2
    q = (torch.randn(rows, vocab, generator=generator) * 2).softmax(-1)
    return s, q


def test_transfer_follows_its_formula():
    s = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    q = torch.tensor([[0.2, 0.7, 0.06, 0.04]])  # the tail is below 0.1 * 0.7 = 0.07
    s_hat = transfer(s, q, eta=10.0, alpha=0.1)
    expected = s + torch.tensor([[10 * (0.2 - 0.5), 10 * (0.7 - 0.3), 0.0, 0.0]])
    torch.testing.assert_close(s_hat, expected)


def test_transfer_is_a_gradient_step_on_the_divergence():
    """z_hat = z - η dL/dz / T for L = T² KL(q || softmax(z / T)), without the tail test."""
    temperature, eta = 0.7, 5.0
    z = torch.randn(1, 16, generator=seeded(), dtype=torch.float64).requires_grad_()
    q = torch.randn(1, 16, generator=seeded(1), dtype=torch.float64).softmax(-1)
    loss = temperature**2 * (q * (q.log() - (z / temperature).log_softmax(-1))).sum()
    (gradient,) = torch.autograd.grad(loss, z)
    z_hat = z.detach() - eta * gradient
    s_hat = transfer(z.detach() / temperature, q, eta, alpha=0.0)
    torch.testing.assert_close(s_hat, z_hat / temperature)


def test_transfer_without_strength_is_the_same_tensor():
    s, q = distributions(2)
    assert transfer(s, q, 0.0, 0.1) is s


def test_transfer_keeps_what_the_target_ruled_out():
    s = torch.tensor([[0.0, -INF, 1.0]])
    s_hat = transfer(s, torch.tensor([[0.1, 0.8, 0.1]]), eta=40.0, alpha=0.1)
    assert s_hat[0, 1] == -INF
    assert not s_hat.isnan().any()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.sampled_from([1.0, 5.0, 40.0]))
def test_tail_protection_is_on_the_drafters_distribution(seed, alpha, eta):
    s, q = distributions(3, seed=seed)
    changed = transfer(s, q, eta, alpha) != s
    tail = q < alpha * q.amax(-1, keepdim=True)
    assert not changed[tail].any()


def test_a_dynamic_eta_follows_confidence_and_position():
    q = torch.zeros(3, 8)
    start = dynamic_eta(10.0, 0.5, 0, q)
    assert start.shape == (3, 1)
    assert start[:, 0].tolist() == pytest.approx([5 * 2 ** (-t / ETA_HALF_LIFE) for t in range(3)])
    later = dynamic_eta(10.0, 1.0, ETA_HALF_LIFE, q)
    assert later[0].item() == pytest.approx(5)
    assert dynamic_eta(10.0, 0.0, 0, q).tolist() == [[0.0]] * 3


def test_every_position_has_its_own_eta():
    s, q = distributions(3)
    etas = torch.tensor([[0.0], [5.0], [20.0]])
    rows = [transfer(s[i : i + 1], q[i : i + 1], etas[i].item(), 0.1) for i in range(3)]
    torch.testing.assert_close(transfer(s, q, etas, 0.1), torch.cat(rows))


@pytest.mark.parametrize("greedy", [True, False])
def test_an_eta_for_each_position_replaces_the_configs(greedy):
    """Of two sure drafts of what the target finds unlikely, the one with a strong η is kept."""
    s = torch.tensor([[2.0, 0.0, 0.0]]).repeat(3, 1)
    draft, q = torch.tensor([1, 1]), torch.eye(3)[[1, 1]]
    config = SpeculationConfig(eta=0.0)

    def judge(first: float, second: float) -> int:
        eta = torch.tensor([[first], [second]])
        if greedy:
            return int(verify_greedy(s, q, draft, config, eta)[0])
        return int(verify_sampled(s, q, draft, config, seeded(), eta)[0])

    assert [judge(40, 40), judge(40, 0), judge(0, 40)] == [2, 1, 0]


def test_residuals_of_the_three_modes_are_those_of_the_literature():
    """norm(max(base - m, 0)) is each mode's residual as the literature writes it."""
    s, q = distributions(1)
    p, p_hat = s[0].softmax(-1), transfer(s, q, 5.0, 0.1)[0].softmax(-1)
    q = q[0]
    zero = torch.zeros_like(p)
    exact = torch.maximum(p - q, zero)
    augmented = torch.maximum(p_hat - q, zero)
    paper = torch.maximum(torch.maximum(p - p_hat, p - q), zero)
    torch.testing.assert_close(residual(p, torch.minimum(q, p)), exact)
    torch.testing.assert_close(residual(p_hat, torch.minimum(q, p_hat)), augmented)
    torch.testing.assert_close(residual(p, torch.minimum(q, p_hat)), paper)


@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_the_token_after_the_accepted_ones_is_drawn_from_the_modes_residual_or_bonus(
    mode, monkeypatch
):
    weights = []
    monkeypatch.setattr(acceptance, "draw", lambda given, _: weights.append(given) or NO_DRAFT)
    s, q = distributions(2)
    config = SpeculationConfig(mode=mode, eta=5.0)
    p, p_hat = s.softmax(-1), transfer(s, q, config.transfer_strength, config.alpha).softmax(-1)
    base = p_hat if mode == "augmented" else p
    after = {0: (base[0] - torch.minimum(q[0], p_hat[0])).clamp(min=0), 1: base[1]}
    seen = set()
    for seed in range(40):
        draft = torch.multinomial(q[:1], 1, generator=seeded(seed))[0]
        accepted = int(verify_sampled(s, q, draft, config, seeded(seed))[0])
        torch.testing.assert_close(weights[-1], after[accepted])
        seen.add(accepted)
    assert seen == {0, 1}


def test_a_residual_of_zero_falls_back_to_the_base():
    base = torch.tensor([0.25, 0.75])
    assert torch.equal(residual(base, base), base)


@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_a_token_of_probability_zero_is_never_accepted(mode, monkeypatch):
    """u may be 0.0 itself; `u <= 0` would accept what the target rules out."""
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.zeros(n))
    s = torch.tensor([[0.0, -INF, 0.0], [0.0, 0.0, 0.0]])
    q = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    for seed in range(20):
        accepted, token = verify_sampled(
            s, q, torch.tensor([1]), SpeculationConfig(mode=mode), seeded(seed)
        )
        assert accepted == 0
        assert token != 1


def test_agreeing_models_accept_everything():
    s, _ = distributions(4)
    q = s.softmax(-1)
    draft = torch.tensor([1, 2, 3])
    for seed in range(50):
        accepted, _ = verify_sampled(s, q[:3], draft, SpeculationConfig(mode="exact"), seeded(seed))
        assert accepted == 3


def test_nothing_after_a_rejection_is_accepted():
    s = torch.full((4, 3), -INF)
    s[:, 0] = 0.0  # the target only ever says 0
    q = torch.full((3, 3), 1 / 3)
    accepted, token = verify_sampled(
        s, q, torch.tensor([0, 1, 0]), SpeculationConfig(mode="exact"), seeded()
    )
    assert accepted <= 1
    assert token == 0


@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_an_empty_draft_is_plain_decoding(mode):
    s, _ = distributions(1)
    config = SpeculationConfig(mode=mode)
    none = torch.empty(0, s.shape[1])
    counts = torch.zeros(s.shape[1])
    generator = seeded()
    for _ in range(4000):
        accepted, token = verify_sampled(s, none, NO_DRAFT, config, generator)
        assert accepted == 0
        counts[token] += 1
    torch.testing.assert_close(counts / 4000, s[0].softmax(-1), atol=0.03, rtol=0)
    assert verify_greedy(s, none, NO_DRAFT, config)[1] == s.argmax()


def test_greedy_verification_accepts_the_argmax_of_each_mode():
    s = torch.log(torch.tensor([[0.6, 0.4, 1e-9], [0.6, 0.4, 1e-9], [0.2, 0.8, 1e-9]]))
    q = torch.tensor([[0.1, 0.9, 0.0], [0.1, 0.0, 0.9], [0.9, 0.1, 0.0]])
    exact, paper, augmented = (
        SpeculationConfig(mode=mode, eta=5.0) for mode in ("exact", "paper", "augmented")
    )
    # Position 0: argmax s is 0, but the transfer makes it 1. Position 1: 2 is the drafter's
    # choice, which the target finds too unlikely.
    draft = torch.tensor([1, 2])
    assert [int(x) for x in verify_greedy(s, q, draft, exact)] == [0, 0]
    accepted, token = verify_greedy(s, q, draft, paper)
    assert (int(accepted), int(token)) == (1, 0)
    # The bonus: position 2 says 1 plainly, 0 with the transfer.
    s[1], q[1] = s[0], q[0]
    draft = torch.tensor([1, 1])
    assert [int(x) for x in verify_greedy(s, q, draft, paper)] == [2, 1]
    assert [int(x) for x in verify_greedy(s, q, draft, augmented)] == [2, 0]


def test_draw_is_proportional_and_never_takes_weight_zero():
    weights = torch.tensor([0.0, 3.0, 1.0, 0.0])  # need not sum to 1
    generator = seeded()
    counts = torch.zeros(4)
    for _ in range(8000):
        counts[draw(weights, generator)] += 1
    assert counts[0] == counts[3] == 0
    assert abs(counts[1] / 8000 - 0.75) < 0.02


def test_with_alpha_1_the_drafters_first_choice_is_still_transferred():
    s, q = torch.zeros(1, 4), torch.tensor([[0.1, 0.6, 0.2, 0.1]])
    expected = torch.tensor([[0.0, 2 * (0.6 - 0.25), 0.0, 0.0]])
    torch.testing.assert_close(transfer(s, q, 2.0, 1.0), expected)


def test_after_a_rejected_guess_its_whole_probability_is_left_out():
    q = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        accepted, token = verify_guess(q, torch.tensor([0]), generator, greedy=False)
        assert accepted == 1 or token == 1
