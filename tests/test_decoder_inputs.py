"""What a decoder takes and refuses: prompts, windows, options, tokenizers that differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer, transformers_greedy
from decoding import DRAFT_PROMPT, EXACT, GREEDY, SAMPLED, TARGET_PROMPT

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.errors import ContextWindowError, InvalidParameterError, TokenizerMismatchError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", "hot"),
        ("top_p", 0.0), ("top_p", 1.01), ("top_k", -1), ("top_k", 2.5),
        ("max_new_tokens", 0), ("max_new_tokens", -3), ("repetition_penalty", 0.0),
        ("stop", [""]), ("stop", [3]), ("seed", -1), ("seed", 2**63),
    ],
)  # fmt: skip
def test_bad_sampling_parameters_are_refused(name, value):
    with pytest.raises(InvalidParameterError, match=rf"{name}=.* must be ") as caught:
        SamplingParams(**{name: value})
    assert repr(value).strip("[]") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", 0), ("gamma", -1), ("gamma", 1.5), ("eta", -1.0), ("eta", float("inf")),
        ("alpha", 1.1), ("alpha", -0.1), ("mode", "best"), ("gamma", "all"), ("gamma", True),
        ("drafting", "magic"), ("lookup", "yes"), ("min_confidence", 1.5),
        ("min_confidence", -0.1),
    ],
)  # fmt: skip
def test_bad_speculation_parameters_are_refused(name, value):
    with pytest.raises(InvalidParameterError, match=rf"{name}=.* must be "):
        SpeculationConfig(**{name: value})


def test_a_prompt_that_fills_the_window_is_refused_with_both_numbers(decoder):
    with pytest.raises(ContextWindowError, match=r"512 tokens.*LlamaForCausalLM 512.*by 1 token"):
        decoder.stream([5] * 512, sampling=GREEDY)
    with pytest.raises(ContextWindowError, match=r"600 tokens.*by 89 tokens$"):
        decoder.generate(None, [5] * 600, sampling=GREEDY)


@pytest.mark.parametrize("draft_prompt", [None, DRAFT_PROMPT], ids=["plain", "drafted"])
def test_an_answer_may_have_what_the_window_leaves(decoder, draft_prompt):
    target = [*TARGET_PROMPT, *[5] * 480]
    for asked, had in ((10, 10), (20, 20), (21, 20), (512, 20), (10**9, 20)):
        sampling = SamplingParams(max_new_tokens=asked, ignore_eos=True)
        result = decoder.generate(target, draft_prompt, sampling=sampling, speculation=EXACT)
        assert len(result.token_ids) == result.stats.max_new_tokens == had
        assert result.finish_reason == "length"
    assert result.token_ids == transformers_greedy(decoder.target.model, target, 20)
    assert len(decoder.generate([5] * 511, sampling=GREEDY).token_ids) == 1


def small_drafter() -> RapidDecoder:
    """A drafter of 64 positions beside a target of 512."""
    drafter = tiny_model(seed=1, max_position_embeddings=64)
    return RapidDecoder(tiny_model(), tiny_tokenizer(), drafter, drafter_name="short")


@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_a_draft_prompt_beyond_the_drafters_window_is_left_out(mode):
    decoder, config = small_drafter(), SpeculationConfig(mode=mode)
    result = decoder.generate(TARGET_PROMPT, [6] * 64, sampling=GREEDY, speculation=config)
    assert result.token_ids == transformers_greedy(decoder.target.model, TARGET_PROMPT, 40)
    assert result.stats.draft_skipped == (
        "the draft prompt has 64 tokens, the context window of short 64"
    )
    assert (result.stats.method, result.stats.draft_prompt_tokens) == ("lc", 0)
    with pytest.raises(ContextWindowError, match="short 64"):
        decoder.generate(None, [6] * 64, sampling=GREEDY)


@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("drafted", [63, 50, 25, 24])
def test_a_drafter_drafts_as_far_as_its_window_goes(mode, sampling, drafted):
    """The answer is as long as was asked for; what the drafter cannot hold, the target says."""
    decoder = small_drafter()
    positions = []
    run = decoder.drafter.__class__.__call__

    class Watched(type(decoder.drafter)):
        def __call__(self, tokens, cache, *args):
            if self is decoder.drafter:
                positions.append(cache.length + len(tokens))
            return run(self, tokens, cache, *args)

    decoder.drafter.__class__ = Watched
    config = SpeculationConfig(mode=mode, gamma=4, lookup=False)
    result = decoder.generate(TARGET_PROMPT, [6] * drafted, sampling=sampling, speculation=config)
    assert len(result.token_ids) == result.stats.max_new_tokens == 40
    assert result.stats.draft_skipped is None
    assert max(positions) == min(64, drafted + 39 + (mode == "augmented"))
    if mode == "exact" and sampling is GREEDY:
        assert result.token_ids == transformers_greedy(decoder.target.model, TARGET_PROMPT, 40)


def test_bad_prompts_are_refused_at_the_call(decoder):
    for target, draft in ((None, None), ([], None), ("", None), ([99], None), (TARGET_PROMPT, [])):
        with pytest.raises(InvalidParameterError):
            decoder.stream(target, draft)  # at the call, not at the first chunk


def test_tokenizers_that_differ_are_refused():
    target = tiny_model()
    with pytest.raises(TokenizerMismatchError, match=r"80.*64.*drafter_tokenizer"):
        RapidDecoder(target, tiny_tokenizer(), tiny_model(vocab_size=80))
    other = tiny_tokenizer(63)
    with pytest.raises(TokenizerMismatchError, match=r"'w63'.*not only in tokens that were added"):
        RapidDecoder(target, tiny_tokenizer(), tiny_model(seed=1), drafter_tokenizer=other)


def with_added(*tokens: str) -> Any:
    tokenizer = tiny_tokenizer(60)
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def test_an_added_token_must_have_one_id_and_an_id_one_token():
    for ours, theirs in ((["<a>"], ["<b>"]), (["<a>", "<b>"], ["<b>", "<a>"])):
        with pytest.raises(TokenizerMismatchError, match=r"<[ab]>"):
            RapidDecoder(
                tiny_model(),
                with_added(*ours),
                tiny_model(seed=1),
                drafter_tokenizer=with_added(*theirs),
            )


@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("width", [61, 64])
def test_a_drafter_without_some_added_tokens_drafts_until_one_is_said(mode, sampling, width):
    target = tiny_model(eos_token_id=None)
    with torch.no_grad():  # it likes <y>, id 61, which the drafter does not have
        target.lm_head.weight[61] *= 4
    drafter = tiny_model(seed=1, vocab_size=width)
    decoder = RapidDecoder(
        target, with_added("<x>", "<y>"), drafter, drafter_tokenizer=with_added("<x>")
    )
    config = SpeculationConfig(mode=mode, gamma=4, eta=2.0)
    result = decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=sampling, speculation=config)
    assert 61 in result.token_ids
    assert result.stats.drafted_tokens > 0
    assert len(result.token_ids) == 40
    if mode == "exact" and sampling is GREEDY:
        assert result.token_ids == transformers_greedy(target, TARGET_PROMPT, 40)
    skipped = decoder.generate(TARGET_PROMPT, [5, 61], sampling=sampling, speculation=config)
    assert skipped.stats.draft_skipped == "the draft prompt holds '<y>', which " + (
        "LlamaForCausalLM does not have"
    )
    with pytest.raises(TokenizerMismatchError, match="holds '<y>'"):
        decoder.generate(None, [5, 61])
    with pytest.raises(TokenizerMismatchError, match="holds '<y>'"):
        decoder.log_likelihood([5, 61], "w5", drafter=True)


def test_a_token_that_the_model_has_no_embedding_for_is_named():
    """As after tokens were added to a tokenizer alone; on a GPU it would end every later call."""
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer(80))
    for ask in (decoder.generate, lambda prompt: decoder.log_likelihood(prompt, "w5")):
        with pytest.raises(TokenizerMismatchError, match=r"'w70'.*resize_token_embeddings"):
            ask([5, 70, 6])
    assert decoder.generate([5, 6], sampling=GREEDY).token_ids


@pytest.mark.parametrize("mode", ["exact", "augmented", "paper"])
def test_an_added_token_of_the_drafter_alone_is_never_drafted(mode):
    drafter = tiny_model(seed=1)
    with torch.no_grad():
        drafter.lm_head.weight[61] *= 9
    decoder = RapidDecoder(
        tiny_model(), with_added("<x>"), drafter, drafter_tokenizer=with_added("<x>", "<y>")
    )
    config = SpeculationConfig(mode=mode, gamma=4, eta=40.0)
    result = decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=SAMPLED, speculation=config)
    assert 61 not in result.token_ids


def test_template_variables_of_a_call_go_before_the_decoders():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}{{ a }} {{ b }}"
    decoder = RapidDecoder(
        tiny_model(), tokenizer, chat_template_kwargs={"a": "w10", "b": "w11 w12"}
    )
    chat = [{"role": "user", "content": "w5"}]
    one = SamplingParams(max_new_tokens=1)

    def read(**options):
        progress = []
        stats = decoder.generate(
            chat, chat, sampling=one, progress=lambda *p: progress.append(p), **options
        ).stats
        return stats.prompt_tokens, stats.draft_prompt_tokens

    assert read() == (4, 4)
    assert read(chat_template_kwargs={"b": ""}) == (2, 2)
    with pytest.raises(InvalidParameterError, match="'tokenize'"):
        decoder.stream(chat, chat_template_kwargs={"tokenize": True})
    with pytest.raises(InvalidParameterError, match="'tokenize'"):
        RapidDecoder(tiny_model(), tokenizer, chat_template_kwargs={"tokenize": True})
