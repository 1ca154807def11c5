"""The drafter over the retrieved context: checked guesses, and the passes that they save."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from conftest import counting_model, tiny_model, tiny_tokenizer, transformers_greedy
from drafting import CPU, DRAFT_PROMPT, GREEDY, PROMPT, SAMPLED
from scipy.stats import chisquare
from torch import Tensor

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.costs import PassCost
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.quantized import MAX_QUANTIZED_ROWS
from rapid_llm.engine.session import Session
from rapid_llm.speculation.acceptance import verify_guess
from rapid_llm.speculation.drafters import rag
from rapid_llm.speculation.drafters.rag import RagDrafter
from rapid_llm.speculation.sampling import Sampler

# --- checking guesses ------------------------------------------------------------------------


def test_greedy_guesses_are_accepted_while_they_are_the_argmax():
    q = torch.eye(5)[[2, 0, 3, 1]] * 0.5 + 0.1
    for guess, expected in (
        ([2, 0, 3], (3, 1)),
        ([2, 0, 4], (2, 3)),
        ([2, 1, 3], (1, 0)),
        ([0, 0, 3], (0, 2)),
    ):
        accepted, token = verify_guess(q, torch.tensor(guess), None, greedy=True)
        assert (accepted.item(), token.item()) == expected
    accepted, token = verify_guess(q[:1], torch.tensor([], dtype=torch.long), None, greedy=True)
    assert (accepted.item(), token.item()) == (0, 2)


def p_value(counts: Tensor, law: Tensor) -> float:
    possible = law > 0
    assert counts[~possible].sum() == 0
    if possible.sum() == 1:
        return 1.0
    expected = law[possible].double() * counts.sum() / law[possible].double().sum()
    return float(chisquare(counts[possible].numpy(), expected.numpy()).pvalue)


@pytest.mark.parametrize(
    ("first", "guess"),
    [
        ([0.1, 0.4, 0.2, 0.3, 0.0], [1, 2]),
        ([0.6, 0.1, 0.2, 0.1, 0.0], [1, 2]),  # an unlikely guess
        ([0.0, 1.0, 0.0, 0.0, 0.0], [1, 2]),  # a certain one
        ([0.3, 0.0, 0.3, 0.4, 0.0], [1, 2]),  # an impossible one
    ],
)
def test_checked_guesses_follow_q(first, guess):
    q = torch.tensor([first, [0.2, 0.3, 0.1, 0.1, 0.3], [0.05, 0.05, 0.5, 0.2, 0.2]])
    generator = torch.Generator().manual_seed(7)
    counts = torch.zeros(3, 5)
    for _ in range(8000):
        accepted, token = verify_guess(q, torch.tensor(guess), generator, greedy=False)
        n = int(accepted)
        for position, said in enumerate([*guess[:n], int(token)]):
            counts[position, said] += 1
    # Later positions are reached by way of the guess only, and then their own q holds.
    assert counts[1].sum() == counts[0, guess[0]]
    assert counts[2].sum() == counts[1, guess[1]]
    for position in range(3):
        if counts[position].sum() > 0:
            assert p_value(counts[position], q[position]) > 1e-3
    assert (counts[1].sum() == 0) == (first[guess[0]] == 0)


# --- the cascade -----------------------------------------------------------------------------


def rag_drafter(
    model: torch.nn.Module,
    prompt: Sequence[int],
    sampling: SamplingParams = GREEDY,
    vocab_size: int = 64,
    document: Sequence[int] = (),
    **config,
) -> RagDrafter:
    runner = ModelRunner(model, "tiny")
    drafter = RagDrafter(
        Session(runner, runner.new_cache(len(prompt) + 100)),
        prompt,
        Sampler(sampling, prompt, CPU, model),
        vocab_size,
        SpeculationConfig(**({"gamma": 16} | config)),
        document,
    )
    with torch.inference_mode():
        drafter.prefill(None)
    return drafter


@torch.inference_mode()
def q_after(model: torch.nn.Module, sequence: Sequence[int]) -> Tensor:
    return model(torch.tensor([list(sequence)])).logits[0, -1].softmax(-1)


@pytest.mark.parametrize("gamma", [1, 2, 5, 9, 16])
def test_greedy_drafts_are_the_same_with_and_without_guesses(gamma):
    model = counting_model(attention=0.1)
    words = [*range(3, 64), 9, 3]
    with_guesses = rag_drafter(model, words)
    without = rag_drafter(model, words, lookup=False)
    saved, guessed_wrong = 0, False
    output: list[int] = []
    with torch.inference_mode():
        for _ in range(6):
            ours = with_guesses.draft(output, gamma, look_ahead=False)
            theirs = without.draft(output, gamma, look_ahead=False)
            assert ours.tokens.tolist() == theirs.tokens.tolist()
            torch.testing.assert_close(ours.probabilities, theirs.probabilities)
            assert ours.probabilities.shape == (gamma, 64)
            assert theirs.passes == gamma
            assert 1 <= ours.passes <= gamma
            saved += theirs.passes - ours.passes
            guessed_wrong |= ours.passes > 1 + gamma // MAX_QUANTIZED_ROWS
            # The target keeps a part, and says something of its own.
            output += [*ours.tokens.tolist()[: gamma // 2 + 1], 3 + len(output) % 50]
    assert (saved > 0) == (gamma > 1)
    assert guessed_wrong == (gamma > 1)


def test_a_quotation_takes_a_pass_for_eight_tokens():
    """The prompt holds every word in order, and the model says them so."""
    drafter = rag_drafter(counting_model(), [*range(3, 64), 3, 4])
    with torch.inference_mode():
        draft = drafter.draft([], 17, look_ahead=False)
        assert draft.tokens.tolist() == [*range(5, 22)]
        assert draft.passes == 3
        # After a draft that was kept whole two tokens are pending.
        draft = drafter.draft([*range(5, 23)], 15, look_ahead=False)
        assert draft.tokens.tolist() == [*range(23, 38)]
        assert draft.passes == 2


def test_guesses_come_from_the_output_too():
    drafter = rag_drafter(counting_model(), [3, 4])
    output = [*range(5, 64), 3, 4]
    with torch.inference_mode():
        drafter.draft(output[:-1], 1, look_ahead=False)
        draft = drafter.draft(output, 7, look_ahead=False)
    assert draft.tokens.tolist() == [*range(5, 12)]
    assert draft.passes == 1


def test_guesses_come_from_the_document_too_but_later_text_comes_first():
    document = [*range(20, 64), 3, 4, 30, 31]
    drafter = rag_drafter(counting_model(), [5, 6, 3, 4], document=document)
    with torch.inference_mode():
        drafter.draft([*range(5, 21)], 1, look_ahead=False)
        draft = drafter.draft([*range(5, 22)], 7, look_ahead=False)
    assert draft.tokens.tolist() == [*range(22, 29)]
    assert draft.passes == 1
    drafter = rag_drafter(counting_model(), [3, 4, 5, 6, 7, 3, 4], document=document)
    with torch.inference_mode():
        draft = drafter.draft([], 4, look_ahead=False)  # not 30, 31
    assert draft.tokens.tolist() == [5, 6, 7, 8]
    assert draft.passes == 1
    assert drafter.prompt_tokens == 7


@pytest.mark.parametrize("right", [False, True])
def test_guesses_are_as_long_as_they_pay(right, monkeypatch):
    """A row costs half a pass; every guess is wrong, or every one right."""
    monkeypatch.setattr(rag, "pass_cost", lambda session: PassCost(1.0, 0.5 - 0.45 * right))
    said = [*range(3, 64)] if right else [token for t in range(3, 63) for token in (t, t + 1, 5)]
    drafter = rag_drafter(counting_model(), [*said, 3, 4], gamma="auto")
    rows = []
    extend = drafter._session.extend
    monkeypatch.setattr(
        drafter._session,
        "extend",
        lambda tokens, keep, whole: rows.append(keep) or extend(tokens, keep, whole),
    )
    with torch.inference_mode():
        for first in range(5, 50, 5):
            drafter.draft([*range(5, first)], 5, look_ahead=False)
    assert set(rows[-5:]) == ({5} if right else {1})


def test_a_wrong_guess_leaves_no_trace():
    model = counting_model()
    drafter = rag_drafter(model, [3, 4, 40, 41, 50, 51, 3, 4])  # after 3, 4 it guesses 40, says 5
    with torch.inference_mode():
        draft = drafter.draft([], 3, look_ahead=True)
    assert draft.tokens.tolist() == [5, 6, 7]
    for i in range(4):
        torch.testing.assert_close(draft.probabilities[i], q_after(model, [*range(3, 5 + i)]))


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_look_ahead_adds_the_distribution_after_the_draft(sampling, lookup):
    model = tiny_model()
    for gamma in (0, 1, 4):
        drafter = rag_drafter(model, PROMPT, sampling, lookup=lookup)
        with torch.inference_mode():
            draft = drafter.draft([9, 8], gamma, look_ahead=True)
        assert draft.tokens.shape == (gamma,)
        assert draft.probabilities.shape == (gamma + 1, 64)
        sequence = [*PROMPT, 9, 8, *draft.tokens.tolist()]
        for i, row in enumerate(draft.probabilities):
            torch.testing.assert_close(row, q_after(model, sequence[: len(PROMPT) + 2 + i]))
        if not lookup:
            assert draft.passes == gamma + 1


def test_a_wider_or_narrower_drafter_fits_the_targets_width():
    for width, expected in ((80, 64), (64, 80)):
        model = tiny_model(vocab_size=width)
        drafter = rag_drafter(model, PROMPT, SAMPLED, vocab_size=expected)
        with torch.inference_mode():
            draft = drafter.draft([], 6, look_ahead=True)
        assert draft.probabilities.shape == (7, expected)
        torch.testing.assert_close(draft.probabilities.sum(-1), torch.ones(7))
        assert draft.probabilities[:, 64:].sum() == 0
        assert draft.tokens.max() < 64


def test_a_draft_ends_after_a_token_that_it_is_not_sure_of():
    model = tiny_model(initializer_range=0.6)
    with torch.inference_mode():
        whole = rag_drafter(model, PROMPT, lookup=False).draft([], 12, look_ahead=False)
        chosen = whole.probabilities.gather(1, whole.tokens[:, None])[:, 0].tolist()
        assert min(chosen) < 0.5 < max(chosen)
        for confidence in (0.2, 0.5, min(chosen), 1.0):
            unsure = [i for i, q in enumerate(chosen) if q < confidence]
            length = unsure[0] + 1 if unsure else 12
            drafter = rag_drafter(model, PROMPT, lookup=False, min_confidence=confidence)
            draft = drafter.draft([], 12, look_ahead=False)
            assert draft.tokens.tolist() == whole.tokens.tolist()[:length]
            assert draft.passes == length
            after = drafter.draft([], 12, look_ahead=True)
            assert after.probabilities.shape == (length + 1, 64)


def test_confidence_shortens_drafts_and_changes_no_greedy_answer():
    model = tiny_model(eos_token_id=None)
    decoder = RapidDecoder(model, tiny_tokenizer())

    def run(confidence):
        config = SpeculationConfig(gamma=8, eta=0, min_confidence=confidence)
        return decoder.generate(PROMPT, DRAFT_PROMPT, sampling=GREEDY, speculation=config)

    sure, always = run(0.6), run(0.0)
    assert sure.token_ids == always.token_ids == transformers_greedy(model, PROMPT, 40)
    assert sure.stats.drafted_tokens < always.stats.drafted_tokens
    assert sure.stats.acceptance_ratio > always.stats.acceptance_ratio
