"""What a decoder answers: lossless modes, ends, streams, stats; its passes, bytes and waits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model, tiny_tokenizer, transformers_greedy
from decoding import DRAFT_PROMPT, EXACT, GREEDY, SAMPLED, TARGET_PROMPT, CountedForward

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("gamma", [1, 4, 10])
def test_greedy_without_transfer_is_what_transformers_generates(architecture, gamma):
    model = tiny_model(architecture, eos_token_id=None)
    decoder = RapidDecoder(model, tiny_tokenizer())
    result = decoder.generate(
        TARGET_PROMPT,
        DRAFT_PROMPT,
        sampling=GREEDY,
        speculation=SpeculationConfig(gamma=gamma, eta=0.0),
    )
    assert result.token_ids == transformers_greedy(model, TARGET_PROMPT, 40)
    assert result.stats.method == "sd"
    assert result.stats.drafted_tokens > 0


@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_a_larger_drafter_of_another_width_drafts_for_a_smaller_target(mode):
    target = tiny_model(eos_token_id=None)
    drafter = tiny_model("qwen3", hidden_size=64, num_hidden_layers=3, vocab_size=80)
    decoder = RapidDecoder(target, tiny_tokenizer(), drafter, drafter_tokenizer=tiny_tokenizer())
    result = decoder.generate(
        TARGET_PROMPT,
        DRAFT_PROMPT,
        sampling=GREEDY,
        speculation=SpeculationConfig(gamma=3, eta=0.0, mode=mode),
    )
    assert result.token_ids == transformers_greedy(target, TARGET_PROMPT, 40)
    sampled = decoder.generate(
        TARGET_PROMPT,
        DRAFT_PROMPT,
        sampling=SAMPLED,
        speculation=SpeculationConfig(gamma=3, eta=40.0, mode=mode),
    )
    assert len(sampled.token_ids) == 40
    assert max(sampled.token_ids) < 64


def test_repetition_penalty_follows_transformers():
    model = tiny_model(eos_token_id=None)
    decoder = RapidDecoder(model, tiny_tokenizer())
    sampling = SamplingParams(max_new_tokens=40, repetition_penalty=1.3, ignore_eos=True)
    reference = transformers_greedy(model, TARGET_PROMPT, 40, repetition_penalty=1.3)
    assert reference != transformers_greedy(model, TARGET_PROMPT, 40)
    for draft_prompt in (None, DRAFT_PROMPT):
        result = decoder.generate(TARGET_PROMPT, draft_prompt, sampling=sampling, speculation=EXACT)
        assert result.token_ids == reference


@pytest.mark.parametrize(
    "limits", [{"top_k": 3}, {"top_p": 0.4}, {"top_k": 1}, {"top_k": 5, "top_p": 0.7}]
)
@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_top_k_and_top_p_bound_every_token(decoder, limits, mode):
    """No mode may emit a token that the target's own top-k and top-p rule out."""
    sampling = SamplingParams(temperature=1.5, max_new_tokens=30, seed=5, ignore_eos=True, **limits)
    result = decoder.generate(
        TARGET_PROMPT,
        DRAFT_PROMPT,
        sampling=sampling,
        speculation=SpeculationConfig(gamma=3, eta=20.0, mode=mode),
    )
    logits = decoder.target.model(torch.tensor([TARGET_PROMPT + result.token_ids])).logits[0]
    for position, token in enumerate(result.token_ids):
        row = logits[len(TARGET_PROMPT) + position - 1] / 1.5
        order = row.argsort(descending=True)
        rank = order.tolist().index(token)
        assert rank < limits.get("top_k", 64)
        above = row.softmax(-1)[order[:rank]].sum()
        assert above < limits.get("top_p", 1.0) + 1e-4


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft_prompt", [None, DRAFT_PROMPT], ids=["plain", "drafted"])
def test_stream_and_generate_are_the_same(decoder, sampling, draft_prompt):
    whole = decoder.generate(TARGET_PROMPT, draft_prompt, sampling=sampling)
    chunks = list(decoder.stream(TARGET_PROMPT, draft_prompt, sampling=sampling))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [t for chunk in chunks for t in chunk.token_ids] == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason == "length"
    assert chunks[-1].stats.rounds == len(chunks) == whole.stats.rounds


def test_the_seed_decides(decoder):
    def run(seed):
        sampling = SamplingParams(temperature=1.0, max_new_tokens=20, seed=seed)
        return decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=sampling).token_ids

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)


def test_every_eos_of_the_generation_config_stops(decoder):
    free = decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY).token_ids
    for place in (0, 3, 9):
        ending = free[place]
        ends = (62, ending, decoder.tokenizer.eos_token_id)
        first = next(i for i, token in enumerate(free) if token in ends)
        decoder.target.model.generation_config.eos_token_id = [62, ending]
        again = RapidDecoder(decoder.target.model, decoder.tokenizer)
        sampling = SamplingParams(max_new_tokens=40)
        result = again.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=sampling)
        assert result.token_ids == free[: first + 1]
        assert result.finish_reason == "stop"
        assert again.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY).token_ids == free


def test_a_stop_string_cuts_the_text_exactly(decoder):
    free = decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY)
    cut = free.text.index(" ", 12)
    stop = free.text[cut - 1 : cut + 3]  # across two tokens
    sampling = SamplingParams(max_new_tokens=40, ignore_eos=True, stop=[stop])
    result = decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=sampling)
    assert result.text == free.text[: free.text.index(stop)]
    assert result.finish_reason == "stop"
    assert result.token_ids == free.token_ids[: len(result.token_ids)]
    assert len(result.token_ids) < len(free.token_ids)


@pytest.mark.parametrize("new", [1, 2, 5])
def test_max_new_tokens_is_never_exceeded(decoder, new):
    for gamma in (1, 4, 10):
        sampling = SamplingParams(max_new_tokens=new, ignore_eos=True)
        chunks = decoder.stream(
            TARGET_PROMPT,
            DRAFT_PROMPT,
            sampling=sampling,
            speculation=SpeculationConfig(gamma=gamma, eta=0),
        )
        assert sum(len(chunk.token_ids) for chunk in chunks) == new


def test_stats_add_up(decoder):
    result = decoder.generate(
        TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY, speculation=SpeculationConfig(gamma=10)
    )
    stats = result.stats
    assert stats.method == "rapid"
    assert (stats.prompt_tokens, stats.draft_prompt_tokens) == (12, 4)
    assert stats.completion_tokens == len(result.token_ids) == 40
    assert 0 <= stats.accepted_tokens <= stats.drafted_tokens <= 10 * stats.rounds
    # Each round adds its accepted tokens and one more, but for what the limit cut off.
    assert stats.completion_tokens <= stats.accepted_tokens + stats.rounds
    assert stats.acceptance_ratio == stats.accepted_tokens / stats.drafted_tokens
    # A rejection is judged too, what was drafted after it is not.
    assert 0 < stats.rejections <= stats.rounds
    judged = stats.accepted_tokens + stats.rejections
    assert stats.acceptance_rate == stats.accepted_tokens / judged
    assert stats.acceptance_ratio <= stats.acceptance_rate
    assert 0 < stats.draft_passes <= stats.drafted_tokens
    assert stats.tokens_per_round == 40 / stats.rounds
    assert stats.tokens_per_second == 40 / stats.decode_seconds
    assert 0 < stats.prefill_seconds < stats.time_to_first_token
    assert stats.as_dict()["tokens_per_second"] == stats.tokens_per_second

    plain = decoder.generate(TARGET_PROMPT, sampling=GREEDY).stats
    assert (plain.method, plain.draft_prompt_tokens, plain.drafted_tokens) == ("lc", 0, 0)
    assert (plain.draft_passes, plain.rejections) == (0, 0)
    assert plain.tokens_per_round == 1
    assert plain.acceptance_rate == plain.acceptance_ratio == 0
    alone = decoder.generate(None, DRAFT_PROMPT, sampling=GREEDY)
    assert (alone.stats.method, alone.stats.prompt_tokens) == ("rag", 4)
    assert alone.token_ids == decoder.generate(DRAFT_PROMPT, sampling=GREEDY).token_ids


@pytest.mark.parametrize("lookup", [False, True])
def test_each_prompt_is_read_once_and_each_round_is_one_target_pass(decoder, monkeypatch, lookup):
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", 5)
    counted = CountedForward(monkeypatch)
    speculation = SpeculationConfig(gamma=3, mode="exact", lookup=lookup)
    result = decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY, speculation=speculation)
    stats = result.stats
    assert counted.passes[:4] == [5, 5, 1, 3]  # both prompts, in chunks, but for the last token
    rounds = counted.passes[4:]
    assert len(rounds) == stats.draft_passes + stats.rounds
    # Verification reads 1 + γ; a drafter reads its guesses (at most γ - 1) after 1 token, or after
    # 2 if the round before kept its whole draft.
    assert max(rounds) == 4
    if lookup:
        assert stats.draft_passes < stats.drafted_tokens
    else:
        assert stats.draft_passes == stats.drafted_tokens


@pytest.mark.parametrize("draft_prompt", [None, DRAFT_PROMPT])
def test_kv_memory_follows_the_formula(decoder, monkeypatch, draft_prompt):
    counted = CountedForward(monkeypatch)
    decoder.generate(TARGET_PROMPT, draft_prompt, sampling=GREEDY)
    layers, kv_heads, dim, float32 = 2, 2, 8, 4
    bytes_per_token = layers * 2 * kv_heads * dim * float32
    expected = sorted(
        (len(prompt) + 40) * bytes_per_token for prompt in (TARGET_PROMPT, draft_prompt) if prompt
    )
    assert sorted(cache.nbytes for cache in counted.caches.values()) == expected


def test_a_round_waits_for_the_device_once(decoder, monkeypatch):
    """On a GPU each ``tolist``/``item`` waits for the device, as does a look at the weights, one
    for each prompt."""
    syncs = Counter()
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, _name=name, _original=original):
            syncs[_name] += 1
            return _original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)

    def stats(sampling, **speculation):
        syncs.clear()
        config = SpeculationConfig(gamma=4, **speculation)
        return decoder.generate(
            TARGET_PROMPT, DRAFT_PROMPT, sampling=sampling, speculation=config
        ).stats

    for sampling in (GREEDY, SAMPLED):
        assert syncs == {"tolist": stats(sampling, lookup=False).rounds, "numpy": 2}
        # A guess needs what was drafted before it, and the next pass how much of it was accepted.
        guessed = stats(sampling)
        assert 0 < syncs["__int__"] < guessed.draft_passes
        assert syncs["tolist"] <= guessed.rounds + guessed.draft_passes
        assert set(syncs) == {"tolist", "__int__", "numpy"}
