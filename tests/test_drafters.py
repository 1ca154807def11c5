"""What drafts: guesses and how they are checked, the cascade, compressed KV, lookup alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import counting_model, tiny_model, tiny_tokenizer, transformers_greedy
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.costs import PassCost
from rapid_llm.engine.kv_cache import PreallocatedLayer
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.quantized import MAX_QUANTIZED_ROWS
from rapid_llm.engine.session import Session
from rapid_llm.errors import InvalidParameterError
from rapid_llm.speculation.acceptance import verify_guess
from rapid_llm.speculation.drafters import compressed, rag
from rapid_llm.speculation.drafters.compressed import (
    CompressedDrafter,
    StreamingDrafter,
    TriforceDrafter,
    streaming,
    triforce,
)
from rapid_llm.speculation.drafters.lookup import NgramIndex, PromptLookupDrafter
from rapid_llm.speculation.drafters.rag import RagDrafter
from rapid_llm.speculation.sampling import Sampler

CPU = torch.device("cpu")
PROMPT = [5 + (i * i * 7) % 23 for i in range(40)]
DRAFT_PROMPT = PROMPT[10:30]
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=40, seed=3, ignore_eos=True)
KINDS = ("rag", "streaming", "triforce", "rest")
FAMILY = ("llama", "qwen2", "qwen3", "mistral")


# --- guesses ---------------------------------------------------------------------------------


def test_the_longest_n_gram_counts():
    index = NgramIndex([1, 2, 3, 4, 50, 9, 3, 4, 60, 9, 9, 2, 3, 4, 70])
    assert index.guess([1, 2, 3, 4], 1) == [50]
    assert index.guess([7, 2, 3, 4], 1) == [70]
    assert index.guess([7, 7, 3, 4], 1) == [70]  # its latest occurrence
    assert index.guess([9, 3, 4], 1) == [60]
    assert index.guess([7, 7, 7, 4], 1) == []  # one token says too little
    assert index.guess([4], 1) == []
    assert index.guess([], 1) == []


def test_a_guess_goes_on_to_its_limit_and_beyond_the_end():
    index = NgramIndex([1, 2, 3, 4, 5, 6])
    assert index.guess([1, 2], 3) == [3, 4, 5]
    assert index.guess([1, 2], 6) == [3, 4, 5, 6, 3, 4]
    assert index.guess([4, 5], 3) == [6, 6, 6]


def test_a_text_that_repeats_itself_is_guessed_to_go_on():
    index = NgramIndex([7, 1, 2, 3, 1, 2, 3, 1, 2])
    assert index.guess([1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]


def test_a_text_may_outgrow_its_buffer():
    index = NgramIndex([1, 2, 3])
    for start in range(10, 5000, 10):
        index.extend(range(start, start + 10))
    assert len(index) == 3 + 4990
    assert index.guess([1, 2], 3) == [3, 10, 11]
    assert index.guess([4997, 4998], 1) == [4999]


def test_the_end_does_not_match_itself():
    index = NgramIndex([1, 2, 3])
    assert index.guess([2, 3], 5) == []
    index.extend([4, 2, 3])
    assert index.guess([2, 3], 3) == [4, 2, 3]
    assert len(index) == 6


def found_by_hand(text: Sequence[int], tail: Sequence[int], limit: int) -> list[int]:
    for size in (4, 3, 2):
        if len(tail) >= size:
            for start in range(len(text) - size - 1, -1, -1):
                if list(text[start : start + size]) == list(tail[-size:]):
                    rest = list(text[start + size :])
                    return (rest * limit)[:limit]
    return []


few_words = st.lists(st.integers(0, 2), max_size=30)


@given(parts=st.lists(few_words, max_size=4), tail=few_words, limit=st.integers(1, 9))
def test_guesses_of_a_growing_text_are_those_found_by_hand(parts, tail, limit):
    index = NgramIndex([])
    for part in parts:
        index.extend(part)
    text = [token for part in parts for token in part]
    assert index.guess(tail, limit) == found_by_hand(text, tail, limit)
    assert index.guess(text, limit) == found_by_hand(text, text, limit)


def test_lookup_alone_drafts_what_followed():
    drafter = PromptLookupDrafter([3, 4, 5, 6, 7], 10, CPU)
    assert (drafter.prompt_tokens, drafter.cost().seconds(5)) == (0, 0)
    draft = drafter.draft([8, 4, 5], 4, look_ahead=False)
    assert draft.tokens.tolist() == [6, 7, 8, 4]
    assert draft.passes == 0
    assert torch.equal(draft.probabilities, torch.eye(10)[[6, 7, 8, 4]])
    assert drafter.draft([8, 4, 5, 9], 4, look_ahead=False).probabilities.shape == (0, 10)
    # The output is a source too, and only what was kept of a draft is output.
    assert drafter.draft([8, 4, 5, 9, 8, 4], 2, look_ahead=False).tokens.tolist() == [5, 9]


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


# --- compressed KV ---------------------------------------------------------------------------


@pytest.fixture
def small_budget(monkeypatch) -> int:
    """So that short prompts are compressed: 16 tokens, in chunks of 4."""
    monkeypatch.setattr(compressed, "BUDGET", 16)
    monkeypatch.setattr(compressed, "_CHUNK", 4)
    return 16


def random_layer(length: int, kv_heads: int = 2, dim: int = 8) -> PreallocatedLayer:
    generator = torch.Generator().manual_seed(length)
    layer = PreallocatedLayer(length + 10)
    keys = torch.randn(1, kv_heads, length, dim, generator=generator)
    layer.update(keys, keys + 1)
    return layer


def random_query(length: int, heads: int = 6, dim: int = 8) -> torch.Tensor:
    return torch.randn(heads, dim, generator=torch.Generator().manual_seed(-length))


@pytest.mark.parametrize(
    ("length", "kept"),
    [
        (40, [0, 1, 2, 3, *range(28, 40)]),
        (17, [0, 1, 2, 3, *range(5, 17)]),
        (16, [*range(16)]),
        (3, [0, 1, 2]),
        (1, [0]),
    ],
)
def test_streaming_keeps_the_first_tokens_and_the_latest(small_budget, length, kept):
    assert streaming(random_layer(length)).tolist() == [kept, kept]


def test_streaming_keeps_the_first_tokens_of_a_budget_below_the_sinks(monkeypatch):
    monkeypatch.setattr(compressed, "BUDGET", 2)
    assert streaming(random_layer(9)).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("length", [17, 40, 43])
def test_triforce_keeps_the_chunks_whose_mean_keys_score_highest(small_budget, length):
    layer, query = random_layer(length), random_query(length)
    chosen = triforce(layer, query)
    assert chosen.shape == (2, 16)
    starts = range(length % 4, length, 4)  # chunks end with the prompt
    for head in range(2):
        scores = {}
        for start in starts:
            mean = layer.keys[0, head, start : start + 4].mean(dim=0)
            sharing = query[3 * head : 3 * head + 3]  # this KV head
            scores[start] = max(float(row @ mean) for row in sharing)
        latest = length - 4
        best = sorted(set(starts) - {latest}, key=scores.__getitem__)[-3:]
        expected = [p for start in sorted([*best, latest]) for p in range(start, start + 4)]
        assert chosen[head].tolist() == expected
    if length > 17:
        assert chosen[0].tolist() != chosen[1].tolist()  # each KV head has its own


def test_triforce_keeps_a_short_prompt_whole(small_budget):
    assert triforce(random_layer(16), random_query(16)).tolist() == [[*range(16)]] * 2


def compressed_drafter(
    runner: ModelRunner, kind: type[CompressedDrafter], prompt: Sequence[int], **config
) -> CompressedDrafter:
    target = Session(runner, runner.new_cache(len(prompt) + 60))
    drafter = kind(
        target,
        runner,
        prompt,
        Sampler(GREEDY, prompt, CPU, runner.model),
        SpeculationConfig(**config),
    )
    with torch.inference_mode():
        target.prefill(prompt[:-1])
        drafter.prefill(None)
    return drafter


def test_what_follows_a_gap_has_its_own_position(small_budget):
    """The reference: transformers with a mask that hides what was left out from the new tokens."""
    model = tiny_model()
    drafter = compressed_drafter(ModelRunner(model, "tiny"), StreamingDrafter, PROMPT, lookup=False)
    with torch.inference_mode():
        draft = drafter.draft([], 6, look_ahead=True)
        again = drafter.draft(draft.tokens.tolist()[:2], 4, look_ahead=True)  # after a rollback
    sequence = torch.tensor([*PROMPT, *draft.tokens.tolist()])
    read, n = len(PROMPT) - 1, len(sequence)  # the prompt's last token is the drafter's to read
    visible = torch.ones(n, n).tril().bool()
    visible[read:, 4 : read - 12] = False
    mask = torch.zeros(1, 1, n, n).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.inference_mode():
        logits = model(sequence[None], attention_mask=mask).logits[0, read:]
        unmasked = model(sequence[None]).logits[0, read:]
    torch.testing.assert_close(draft.probabilities, logits.softmax(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.probabilities, draft.probabilities[2:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(draft.probabilities, unmasked.softmax(-1), atol=1e-2)
    assert drafter.prompt_tokens == 16


def test_the_targets_own_cache_is_not_touched(small_budget):
    runner = ModelRunner(tiny_model(), "tiny")
    drafter = compressed_drafter(runner, TriforceDrafter, PROMPT)
    before = [layer.keys.clone() for layer in drafter._target.cache.layers]
    with torch.inference_mode():
        drafter.draft([], 6, look_ahead=True)
    assert drafter._target.length == len(PROMPT) - 1
    for layer, keys in zip(drafter._target.cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, : layer.length], keys[:, :, : layer.length])


# --- in a decoder ----------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1, 4, "auto"])
@pytest.mark.parametrize("drafting", KINDS)
@pytest.mark.parametrize("architecture", FAMILY)
def test_greedy_without_transfer_is_what_transformers_generates(
    small_budget, architecture, drafting, gamma
):
    model = tiny_model(architecture, eos_token_id=None)
    decoder = RapidDecoder(model, tiny_tokenizer())
    config = SpeculationConfig(gamma=gamma, eta=0, drafting=drafting)
    for _ in range(2):  # the second time with kept KV
        result = decoder.generate(PROMPT, DRAFT_PROMPT, sampling=GREEDY, speculation=config)
        assert result.token_ids == transformers_greedy(model, PROMPT, 40)
        drafted = result.stats.drafted_tokens > 0
        assert drafted or gamma == "auto"
        assert result.stats.method == ("sd" if drafted else "lc")


@pytest.mark.parametrize("drafting", ["streaming", "triforce"])
def test_what_keeps_everything_drafts_what_the_target_says(drafting):
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    config = SpeculationConfig(gamma=4, mode="exact", drafting=drafting)
    stats = decoder.generate(PROMPT, sampling=GREEDY, speculation=config).stats
    assert stats.acceptance_ratio == 1
    assert stats.rounds == 40 / 5
    assert stats.draft_prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("drafting", ["streaming", "triforce"])
def test_compression_costs_acceptance_and_reads_no_prompt(small_budget, drafting, monkeypatch):
    read: list[int] = []
    original = Session.reading

    def spy(session, tokens, progress=None):
        read.append(len(tokens))
        return original(session, tokens, progress)

    monkeypatch.setattr(Session, "reading", spy)
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", 10)
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    config = SpeculationConfig(gamma=4, mode="exact", drafting=drafting)
    first, second = (
        decoder.generate(PROMPT, None, sampling=GREEDY, speculation=config).stats for _ in range(2)
    )
    assert read == [len(PROMPT) - 1] * 2  # the target's; the draft prompt is not even looked at
    assert 0 < first.acceptance_ratio < 1
    assert first.draft_prompt_tokens == 16
    assert second.cached_tokens == len(PROMPT) - 1
    assert (second.drafted_tokens, second.accepted_tokens) == (
        first.drafted_tokens,
        first.accepted_tokens,
    )


@pytest.mark.parametrize("drafting", KINDS)
@pytest.mark.parametrize("prompt", [[5], [5, 6], [5, 6, 7]])
def test_prompts_of_a_few_tokens_are_drafted_for(drafting, prompt):
    model = tiny_model(eos_token_id=None)
    decoder = RapidDecoder(model, tiny_tokenizer())
    config = SpeculationConfig(gamma=3, eta=0, drafting=drafting)
    result = decoder.generate(prompt, [9], sampling=GREEDY, speculation=config)
    assert result.token_ids == transformers_greedy(model, prompt, 40)


@pytest.mark.parametrize("drafting", ["streaming", "triforce"])
@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_sampling_repeats_itself_in_every_mode(small_budget, drafting, mode):
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    config = SpeculationConfig(gamma=3, mode=mode, drafting=drafting)
    one, two = (
        decoder.generate(PROMPT, sampling=SAMPLED, speculation=config).token_ids for _ in range(2)
    )
    assert one == two
    assert len(one) == 40


@pytest.mark.parametrize("layer", [0, 1])
def test_memory_that_runs_out_while_triforce_chooses_costs_no_answer(
    small_budget, monkeypatch, layer
):
    config = SpeculationConfig(gamma=3, mode="exact", drafting="triforce")
    ends, attend = [], compressed.attend
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())

    def once(*arguments):
        ends.append(None)
        if len(ends) == layer + 1:
            raise torch.OutOfMemoryError
        return attend(*arguments)

    monkeypatch.setattr(compressed, "attend", once)
    result = decoder.generate(PROMPT, sampling=GREEDY, speculation=config)
    assert result.token_ids == transformers_greedy(tiny_model(eos_token_id=None), PROMPT, 40)
    assert len(ends) == layer + 1 + 2  # once more, over both layers


def test_compressed_drafts_use_the_int8_copy_of_the_target_only(small_budget):
    config = SpeculationConfig(gamma=3, mode="exact", drafting="streaming")
    reference = transformers_greedy(tiny_model(eos_token_id=None), PROMPT, 40)
    for drafter in (None, tiny_model(seed=1)):
        decoder = RapidDecoder(tiny_model(), tiny_tokenizer(), drafter, drafter_quantization="int8")
        result = decoder.generate(PROMPT, sampling=GREEDY, speculation=config)
        assert result.token_ids == reference
        assert (decoder._quantized.nbytes > 0) == (drafter is None)


@pytest.mark.parametrize("drafting", ["streaming", "triforce"])
@pytest.mark.parametrize(
    ("architecture", "attention"),
    [("mistral-sliding", "rapid"), ("gemma3_text", "rapid"), ("granite", "rapid"),
     ("llama", "sdpa")],
)  # fmt: skip
def test_models_that_cannot_be_compressed_are_refused(drafting, architecture, attention):
    decoder = RapidDecoder(
        tiny_model(architecture), tiny_tokenizer(), name="the-target", attn_implementation=attention
    )
    config = SpeculationConfig(drafting=drafting)
    message = f"drafting='{drafting}' needs.*Llama family.*the-target.*drafting='rag' or 'rest'"
    with pytest.raises(InvalidParameterError, match=message):
        decoder.stream(PROMPT, speculation=config)
    # Where nothing drafts, there is nothing to refuse.
    sampling = SamplingParams(max_new_tokens=2)
    assert decoder.generate(None, PROMPT, sampling=sampling, speculation=config).stats.rounds == 2


# --- lookup alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_rest_is_exact_in_every_mode_and_needs_no_draft_prompt(mode):
    model = tiny_model(eos_token_id=None)
    decoder = RapidDecoder(model, tiny_tokenizer())
    reference = transformers_greedy(model, PROMPT, 40)
    # A prompt that holds its own answer, and goes on with something else.
    prompt = [*PROMPT, *reference[:30], 3, *PROMPT]
    config = SpeculationConfig(gamma=4, eta=40, mode=mode, drafting="rest")
    result = decoder.generate(prompt, None, sampling=GREEDY, speculation=config)
    assert result.token_ids == transformers_greedy(model, prompt, 40)
    assert result.stats.method == "sd"
    assert result.stats.drafted_tokens > 0
    assert (result.stats.draft_passes, result.stats.draft_prompt_tokens) == (0, 0)


def test_rest_drafts_what_a_quotation_goes_on_with():
    decoder = RapidDecoder(counting_model(), tiny_tokenizer())
    config = SpeculationConfig(gamma=9, drafting="rest")
    prompt = [*range(3, 64), 3, 4]
    stats = decoder.generate(prompt, sampling=GREEDY, speculation=config).stats
    assert stats.acceptance_ratio == 1
    assert (stats.rounds, stats.rejections) == (40 / 10, 0)


def test_rest_that_finds_nothing_decodes_plainly():
    decoder = RapidDecoder(counting_model(), tiny_tokenizer())
    config = SpeculationConfig(gamma=9, drafting="rest")
    result = decoder.generate([3, 4, 5], sampling=GREEDY, speculation=config)
    assert result.token_ids == [*range(6, 46)]
    assert (result.stats.drafted_tokens, result.stats.rounds) == (0, 40)
    assert result.stats.method == "lc"


def test_every_token_says_where_it_came_from() -> None:
    decoder = RapidDecoder(counting_model(), tiny_tokenizer())
    words = [*range(3, 30)]
    sampling = SamplingParams(max_new_tokens=12)
    speculation = SpeculationConfig(gamma=4)
    plain = list(decoder.stream(words, sampling=sampling))
    assert {origin for delta in plain for origin in delta.origins} == {"target"}
    for lookup, drafted in ((True, "lookup"), (False, "draft")):
        config = replace(speculation, lookup=lookup)
        # The drafter's prompt continues as the answer does.
        for delta in decoder.stream(words, [*range(3, 60), *range(20, 30)], sampling=sampling,
                                    speculation=config):  # fmt: skip
            assert len(delta.origins) == len(delta.token_ids)
            assert set(delta.origins[:-1]) <= {drafted, "draft"}
            assert drafted in delta.origins or len(delta.token_ids) < 3
    sampling = SamplingParams(max_new_tokens=40, temperature=1.0, ignore_eos=True)
    unsure = RapidDecoder(counting_model(0.1), tiny_tokenizer())
    deltas = list(unsure.stream(words, [7, 8], sampling=sampling, speculation=speculation))
    assert deltas[-1].stats.rejections > 0
    assert {delta.origins[-1] for delta in deltas[:-1]} == {"target"}  # the limit may cut the last
