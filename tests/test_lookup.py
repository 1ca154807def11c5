"""Drafting by lookup: guesses from a growing text, and lookup alone as a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from conftest import counting_model, tiny_model, tiny_tokenizer, transformers_greedy
from drafting import CPU, GREEDY, PROMPT
from hypothesis import given
from hypothesis import strategies as st

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.speculation.drafters.lookup import NgramIndex, PromptLookupDrafter

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
