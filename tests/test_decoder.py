"""The decoder on tiny models: lossless modes, streams, errors, counting passes and bytes."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import random
import threading
import time
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    counting_model,
    tiny_model,
    tiny_tokenizer,
    transformers_greedy,
)

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import Memory, RapidDecoder
from rapid_llm.engine import supported
from rapid_llm.engine.cpu import quantizers
from rapid_llm.engine.kv_cache import PreallocatedLayer
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache import prefixes
from rapid_llm.engine.quantized import quantized_nbytes
from rapid_llm.errors import (
    ContextWindowError,
    GenerationTimeoutError,
    InvalidParameterError,
    MissingDependencyError,
    ModelError,
    NumericalError,
    TokenizerMismatchError,
)
from rapid_llm.models import LoadedModel
from rapid_llm.speculation.verification import verify

TARGET_PROMPT = [5, 9, 31, 7, 44, 12, 8, 30, 21, 17, 60, 3]
DRAFT_PROMPT = [31, 7, 44, 3]
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=40, seed=11, ignore_eos=True)
EXACT = SpeculationConfig(gamma=4, mode="exact")


@pytest.fixture
def decoder() -> RapidDecoder:
    return RapidDecoder(tiny_model(), tiny_tokenizer())


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


class CountedForward:
    """Counts the tokens of each forward pass."""

    def __init__(self, monkeypatch) -> None:
        self.passes: list[int] = []
        self.caches = {}
        original = ModelRunner.__call__

        def spy(runner, tokens, cache, *args):
            self.passes.append(len(tokens))
            self.caches[id(cache)] = cache
            return original(runner, tokens, cache, *args)

        monkeypatch.setattr(ModelRunner, "__call__", spy)


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


# --- KV kept between calls -------------------------------------------------------------------


DOCUMENT = random.Random(1).choices(range(3, 64), k=100)
RETRIEVED = DOCUMENT[40:70]
QUESTIONS = [[q, q + 1, q + 2] for q in range(5, 50, 9)]


def ask(decoder, question, speculation=None, document=DOCUMENT, **options):
    """The answer to a question about the document, drafted if a speculation is given."""
    draft_prompt = None if speculation is None else [*RETRIEVED, *question]
    return decoder.generate(
        [*document, *question],
        draft_prompt,
        sampling=options.get("sampling", GREEDY),
        speculation=speculation,
    )


@pytest.fixture
def short_chunks(monkeypatch) -> None:
    """KV is reused by whole passes of a prefill, here of ten tokens and one for the rest."""
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", 10)


def forgetful() -> RapidDecoder:
    """The same weights, and every prompt is read from its beginning."""
    return RapidDecoder(tiny_model(), tiny_tokenizer(), kv_cache_bytes=0)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("speculation", [None, SpeculationConfig(gamma=3, lookup=False)])
def test_the_next_question_on_a_document_reads_only_itself(decoder, monkeypatch, speculation):
    assert ask(decoder, QUESTIONS[0], speculation).stats.cached_tokens == 0
    counted = CountedForward(monkeypatch)
    result = ask(decoder, QUESTIONS[1], speculation)
    stats = result.stats
    # What is left of each prompt, but for its last token, which the first round reads.
    prompts = [2] if speculation is None else [2, 2]
    assert counted.passes[: len(prompts)] == prompts
    assert len(counted.passes) == len(prompts) + stats.rounds + stats.draft_passes
    assert (stats.prompt_tokens, stats.cached_tokens) == (103, 100)
    assert stats.as_dict()["cached_tokens"] == 100
    assert result.token_ids == ask(forgetful(), QUESTIONS[1], speculation).token_ids
    assert ask(decoder, QUESTIONS[1], speculation).stats.cached_tokens == 102


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("speculation", [None, SpeculationConfig(gamma=4)], ids=["plain", "rapid"])
def test_answers_do_not_depend_on_what_was_asked_before(decoder, sampling, speculation):
    for question in (*QUESTIONS, *QUESTIONS[::-1]):
        kept = ask(decoder, question, speculation, sampling=sampling)
        fresh = ask(forgetful(), question, speculation, sampling=sampling)
        assert kept.token_ids == fresh.token_ids
        assert fresh.stats.cached_tokens == 0
        assert (kept.stats.rounds, kept.stats.accepted_tokens) == (
            fresh.stats.rounds,
            fresh.stats.accepted_tokens,
        )


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("speculation", [None, SpeculationConfig(gamma=3)])
def test_the_next_turn_of_a_conversation_reuses_the_prompt_before_it(decoder, speculation):
    first = ask(decoder, QUESTIONS[0], speculation)
    before = [*DOCUMENT, *QUESTIONS[0], *first.token_ids]
    second = ask(decoder, QUESTIONS[1], speculation, document=before)
    # The end of the prompt and the answer are read again, as in a fresh prefill.
    assert second.stats.cached_tokens == len(DOCUMENT)
    again = ask(forgetful(), QUESTIONS[1], speculation, document=before)
    assert second.token_ids == again.token_ids


@pytest.mark.usefixtures("short_chunks")
def test_a_closed_stream_leaves_what_it_has_read(decoder):
    stream = decoder.stream([*DOCUMENT, *QUESTIONS[0]], sampling=GREEDY)
    said = [token for _ in range(3) for token in next(stream).token_ids]
    stream.close()
    longer = [*DOCUMENT, *QUESTIONS[0], *said]
    result = ask(decoder, QUESTIONS[1], document=longer)
    assert result.stats.cached_tokens == len(DOCUMENT)
    assert result.token_ids == ask(forgetful(), QUESTIONS[1], document=longer).token_ids


class FailingForward:
    """One pass of any model fails."""

    def __init__(self, monkeypatch, at: int, error: type[BaseException]) -> None:
        self.tokens = 0
        original, calls = ModelRunner.__call__, iter(range(10_000))

        def fail_once(runner, tokens, cache, *args):
            if next(calls) == at:
                raise error
            self.tokens += len(tokens)
            return original(runner, tokens, cache, *args)

        monkeypatch.setattr(ModelRunner, "__call__", fail_once)


@pytest.mark.usefixtures("short_chunks")
def test_an_error_leaves_what_was_read_before_it(decoder, monkeypatch):
    with monkeypatch.context() as context:
        FailingForward(context, at=4, error=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            ask(decoder, QUESTIONS[0])
    result = ask(decoder, QUESTIONS[0])
    assert result.stats.cached_tokens == 40
    assert result.token_ids == ask(forgetful(), QUESTIONS[0]).token_ids


@pytest.mark.usefixtures("short_chunks")
def test_memory_that_runs_out_in_prefill_is_taken_from_what_is_idle(decoder, monkeypatch):
    expected = ask(forgetful(), QUESTIONS[0])
    other = DOCUMENT[::-1]
    ask(decoder, QUESTIONS[0], document=other)
    with monkeypatch.context() as context:
        counted = FailingForward(context, at=4, error=torch.OutOfMemoryError)
        result = ask(decoder, QUESTIONS[0])
        assert counted.tokens == 102 + 40  # nothing was read twice
    assert result.token_ids == expected.token_ids
    assert ask(decoder, QUESTIONS[0], document=other).stats.cached_tokens == 0


def answer_by_seed():
    return (
        RapidDecoder(counting_model(0.1), tiny_tokenizer())
        .generate(
            [*range(3, 30)],
            [7, 8],
            sampling=SamplingParams(max_new_tokens=12, ignore_eos=True, temperature=1.0, seed=1),
            speculation=SpeculationConfig(mode="exact", gamma=3),
        )
        .token_ids
    )


@pytest.mark.parametrize("at", range(12))
def test_a_seed_gives_the_same_answer_when_memory_runs_out_in_a_round(monkeypatch, at):
    expected = answer_by_seed()
    with monkeypatch.context() as context:
        FailingForward(context, at=at, error=torch.OutOfMemoryError)
        assert answer_by_seed() == expected


def test_a_seed_gives_the_same_answer_when_memory_runs_out_after_the_targets_pass(monkeypatch):
    rounds = itertools.count()

    def verify_or_fail(*arguments):
        if next(rounds) == 1:
            raise torch.OutOfMemoryError
        return verify(*arguments)

    expected = answer_by_seed()
    monkeypatch.setattr("rapid_llm.generation.verify", verify_or_fail)
    assert answer_by_seed() == expected
    assert next(rounds) > 2


@pytest.mark.usefixtures("short_chunks")
def test_memory_that_a_likelihood_needs_is_taken_from_what_is_idle(decoder, monkeypatch):
    expected = forgetful().log_likelihood(DOCUMENT, "w7 w9")
    for at in range(5):
        other = DOCUMENT[::-1]
        ask(decoder, QUESTIONS[0], document=other)
        with monkeypatch.context() as context:
            FailingForward(context, at=at, error=torch.OutOfMemoryError)
            assert decoder.log_likelihood(DOCUMENT, "w7 w9") == expected
        assert ask(decoder, QUESTIONS[0], document=other).stats.cached_tokens == 0
        decoder.clear_cache()


def test_memory_that_a_quantized_copy_needs_is_taken_from_what_is_idle(monkeypatch):
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer(), drafter_quantization="int8")
    ask(decoder, QUESTIONS[0])
    assert decoder.memory.kept_kv > 0
    make, kept = quantizers._copy, []

    def once(*arguments):
        kept.append(decoder.memory.kept_kv)
        if len(kept) == 1:
            raise torch.OutOfMemoryError
        return make(*arguments)

    monkeypatch.setattr(quantizers, "_copy", once)
    result = decoder.generate(QUESTIONS[0], QUESTIONS[0], sampling=SamplingParams(max_new_tokens=4))
    assert result.stats.drafted_tokens > 0
    assert kept[0] > 0 == kept[1]


def test_memory_that_stays_short_is_an_error(decoder, monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as context:
        context.setattr(ModelRunner, "__call__", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            ask(decoder, QUESTIONS[0])
    assert ask(decoder, QUESTIONS[0]).token_ids == ask(forgetful(), QUESTIONS[0]).token_ids


class SeenCaches:
    """Caches that forward passes have written to, and that are still in memory."""

    def __init__(self, monkeypatch) -> None:
        self._seen: weakref.WeakSet = weakref.WeakSet()
        original = ModelRunner.__call__

        def spy(runner, tokens, cache, *args):
            self._seen.add(cache)
            return original(runner, tokens, cache, *args)

        monkeypatch.setattr(ModelRunner, "__call__", spy)

    def __len__(self) -> int:
        gc.collect()
        return len(self._seen)


@pytest.mark.usefixtures("short_chunks")
def test_nothing_is_kept_without_a_budget_or_after_clearing(decoder, monkeypatch):
    caches = SeenCaches(monkeypatch)
    without = forgetful()
    for _ in range(2):
        assert ask(without, QUESTIONS[0], EXACT).stats.cached_tokens == 0
        assert len(caches) == 0
    ask(decoder, QUESTIONS[0], EXACT)
    assert len(caches) == 2  # the target's and the drafter's
    decoder.clear_cache()
    assert len(caches) == 0
    assert ask(decoder, QUESTIONS[0], EXACT).stats.cached_tokens == 0


@pytest.mark.usefixtures("short_chunks")
def test_the_budget_bounds_what_is_kept(monkeypatch):
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, head size, float32
    prompt_and_answer = (103 + 40) * per_token
    caches = SeenCaches(monkeypatch)
    small = RapidDecoder(tiny_model(), tiny_tokenizer(), kv_cache_bytes=2 * prompt_and_answer)
    for shift in range(4):
        ask(small, QUESTIONS[0], document=[*DOCUMENT[20 * shift :], *DOCUMENT[: 20 * shift]])
    assert len(caches) == 2
    with pytest.raises(InvalidParameterError, match="kv_cache_bytes=-1"):
        RapidDecoder(tiny_model(), tiny_tokenizer(), kv_cache_bytes=-1)


@pytest.mark.usefixtures("short_chunks")
def test_threads_share_a_document(decoder):
    expected = [ask(forgetful(), question, EXACT).token_ids for question in QUESTIONS]
    answers: dict[int, list[int]] = {}
    cached: list[int] = []

    def work(i: int) -> None:
        for _ in range(3):
            result = ask(decoder, QUESTIONS[i], EXACT)
            cached.append(result.stats.cached_tokens)
            answers[i] = result.token_ids
            assert result.token_ids == expected[i]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(QUESTIONS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cached) == 3 * len(QUESTIONS)  # no thread has failed
    assert [answers[i] for i in range(len(QUESTIONS))] == expected
    assert max(cached) >= len(DOCUMENT)


@pytest.mark.usefixtures("short_chunks")
def test_a_folder_keeps_prompts_for_the_next_process(tmp_path, monkeypatch):
    monkeypatch.setattr(prefixes, "WORTH_SAVING", 20)
    monkeypatch.setattr(prefixes, "WORTH_LOADING", 10)

    def another_process():
        return RapidDecoder(tiny_model(), tiny_tokenizer(), kv_cache_dir=tmp_path / "kv")

    assert ask(another_process(), QUESTIONS[0], EXACT).stats.cached_tokens == 0
    assert (
        len(list((tmp_path / "kv").glob("*.safetensors"))) == 2
    )  # the document and what was retrieved
    counted = CountedForward(monkeypatch)
    result = ask(another_process(), QUESTIONS[1], EXACT)
    assert result.stats.cached_tokens == len(DOCUMENT)
    assert counted.passes[:2] == [2, 2]
    assert result.token_ids == ask(forgetful(), QUESTIONS[1], EXACT).token_ids


# --- after trouble, the same decoder answers the next call -----------------------------------


@pytest.fixture
def expected(decoder) -> list[int]:
    return decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY).token_ids


def test_a_closed_stream_leaves_nothing_behind(decoder, expected, monkeypatch):
    counted = CountedForward(monkeypatch)
    stream = decoder.stream(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY)
    next(stream)
    assert not torch.is_inference_mode_enabled()  # the caller's own tensors stay trainable
    stream.close()
    passes = len(counted.passes)
    with pytest.raises(StopIteration):
        next(stream)
    assert len(counted.passes) == passes
    assert decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY).token_ids == expected


@pytest.mark.parametrize("at", [1, 3, 12])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_interrupt_leaves_nothing_behind(decoder, expected, monkeypatch, at, error):
    original, calls = PreallocatedLayer.update, iter(range(1000))

    def interrupted(*args, **kwargs):
        if next(calls) == at:
            raise error
        return original(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(PreallocatedLayer, "update", interrupted)
        with pytest.raises(error):
            decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY)
    assert decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY).token_ids == expected


def test_a_timeout_while_reading_the_prompt_leaves_the_decoder_usable(decoder, expected):
    hurried = replace(GREEDY, timeout=1e-9)
    with pytest.raises(GenerationTimeoutError, match=r"timeout=1e-09 s passed after 0 of .* 40 "):
        decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=hurried)
    assert decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY).token_ids == expected


def test_a_timeout_ends_a_stream_after_the_round_and_not_a_finished_answer(
    decoder, expected, monkeypatch
):
    clock, late = time.perf_counter, []
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 700 * len(late))
    sampling = replace(GREEDY, timeout=600)
    stream = decoder.stream(TARGET_PROMPT, sampling=sampling)
    next(stream)
    late.append(True)
    with pytest.raises(GenerationTimeoutError, match="after 2 of at most 40 tokens"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    late.clear()
    stream = decoder.stream(TARGET_PROMPT, sampling=replace(sampling, max_new_tokens=2))
    next(stream)
    late.append(True)
    assert next(stream).finish_reason == "length"
    assert decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY).token_ids == expected


def test_streams_may_interleave(decoder, expected):
    streams = [decoder.stream(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY) for _ in range(3)]
    outputs: list[list[int]] = [[], [], []]
    for chunks in zip(*streams, strict=True):
        for output, chunk in zip(outputs, chunks, strict=True):
            output += chunk.token_ids
    assert outputs == [expected] * 3


def test_threads_get_the_answers_that_they_get_alone(decoder):
    prompts = [[seed + 3, *TARGET_PROMPT] for seed in range(6)]

    def answer(prompt):
        return decoder.generate(prompt, DRAFT_PROMPT, sampling=SAMPLED).token_ids

    alone = [answer(prompt) for prompt in prompts]
    together: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda i=i, p=p: together.update({i: answer(p)}))
        for i, p in enumerate(prompts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(6)] == alone


@pytest.mark.parametrize("broken", ["target", "drafter"])
def test_nan_names_the_model(broken):
    models = {"target": tiny_model(), "drafter": tiny_model(seed=1)}
    with torch.no_grad():
        models[broken].lm_head.weight[7] = float("nan")
    decoder = RapidDecoder(
        models["target"], tiny_tokenizer(), models["drafter"], name="the-target",
        drafter_name="the-drafter",
    )  # fmt: skip
    drafts = SpeculationConfig(gamma=4)  # whether or not they pay
    for sampling in (GREEDY, SAMPLED):
        with pytest.raises(NumericalError, match=f"the-{broken} produced NaN.*dtype"):
            decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=sampling, speculation=drafts)


# --- bad input -------------------------------------------------------------------------------


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


HUB = {"token": "t", "revision": "v1", "cache_dir": "/c", "trust_remote_code": True}


def test_an_old_name_of_an_option_names_the_new_one():
    with pytest.raises(InvalidParameterError, match="'target' is now 'model'"):
        RapidDecoder.from_pretrained(target="org/target")
    with pytest.raises(InvalidParameterError, match="'target' is now 'model'"):
        RapidDecoder(target=tiny_model(), tokenizer=tiny_tokenizer())
    with pytest.raises(InvalidParameterError, match="'attention' is now 'attn_implementation'"):
        RapidDecoder.from_pretrained("org/target", attention="sdpa")


def test_an_option_that_the_model_does_not_have_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no_such_option"):
        RapidDecoder.from_pretrained(tmp_path, device="cpu", no_such_option=3)


def test_hub_options_reach_a_drafter_loaded_by_name(monkeypatch):
    calls = {}

    def load(source, *, dtype, device, **options):
        calls[source] = options
        return LoadedModel(tiny_model(), tiny_tokenizer(), str(source))

    monkeypatch.setattr("rapid_llm.decoder.load_model", load)
    monkeypatch.setattr("rapid_llm.preflight.require_model", lambda *_, **__: None)
    RapidDecoder.from_pretrained("org/target", "org/drafter", subfolder="big", **HUB)
    assert calls == {"org/target": HUB | {"subfolder": "big"}, "org/drafter": HUB}
    own = {"revision": "v2", "gguf_file": "x.gguf"}
    RapidDecoder.from_pretrained("org/target", "org/drafter", drafter_options=own, **HUB)
    assert calls == {"org/target": HUB, "org/drafter": HUB | own}
    decoder = RapidDecoder.from_pretrained("org/target", "org/target", drafter_options=own)
    assert calls["org/target"] == own  # another revision of it is another model
    assert decoder.drafter is not decoder.target
    with pytest.raises(InvalidParameterError, match=r"drafter_options=.*name one"):
        RapidDecoder.from_pretrained("org/target", drafter_options=own)


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


def test_unknown_models_are_named():
    with pytest.raises(ModelError, match=r"no-such/model.*smollm2-135m"):
        RapidDecoder.from_pretrained("no-such/model")
    with pytest.raises(ModelError, match=r"missing\.gguf.*no such file"):
        RapidDecoder.from_pretrained("/nowhere/missing.gguf")
    with pytest.raises(InvalidParameterError, match="'float3'"):
        RapidDecoder.from_pretrained("smollm2-135m", dtype="float3")
    with pytest.raises(InvalidParameterError, match="'tpu9'"):
        RapidDecoder.from_pretrained("smollm2-135m", device="tpu9")


def test_a_local_folder_loads_and_drafts_for_itself(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = tmp_path / "model"
    alone = RapidDecoder.from_pretrained(folder, device="cpu")
    assert alone.drafter is alone.target  # shared weights
    assert RapidDecoder.from_pretrained(folder, folder, device="cpu").drafter.model is not None
    pair = RapidDecoder.from_pretrained(folder, tiny_model(seed=4), device="cpu", dtype="float32")
    assert pair.drafter is not pair.target
    expected = RapidDecoder(model, tokenizer).generate(TARGET_PROMPT, sampling=GREEDY).token_ids
    assert alone.generate(TARGET_PROMPT, sampling=GREEDY).token_ids == expected
    half = RapidDecoder.from_pretrained(folder, device="cpu", dtype="bfloat16")
    assert next(half.target.model.parameters()).dtype == torch.bfloat16


def test_a_model_in_use_is_not_loaded_twice(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    first = RapidDecoder.from_pretrained(tmp_path, device="cpu")
    second = RapidDecoder.from_pretrained(tmp_path, device="cpu")
    assert second.target.model is first.target.model
    other = RapidDecoder.from_pretrained(tmp_path, device="cpu", dtype="bfloat16")
    assert other.target.model is not first.target.model
    freed = weakref.ref(first.target.model)
    del first, second
    gc.collect()
    assert freed() is None


def test_what_is_not_on_this_machine_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidParameterError, match=r"'cuda:7'.*'cpu'"):
        RapidDecoder.from_pretrained("smollm2-135m", device="cuda:7")
    with pytest.raises(InvalidParameterError, match=r"drafter_device='meta'.*name one"):
        RapidDecoder.from_pretrained("smollm2-135m", device="cpu", drafter_device="meta")
    monkeypatch.setattr(supported, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(MissingDependencyError, match=r"flash-attn.*'sdpa'"):
        RapidDecoder(tiny_model(), tiny_tokenizer(), attn_implementation="flash_attention_2")

    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="could not be loaded"):
        RapidDecoder.from_pretrained(tmp_path, device="cpu")


def test_a_decoder_tells_its_memory(monkeypatch):
    monkeypatch.setattr(
        "rapid_llm.engine.device.Device.prefill_chunk", 3
    )  # of short prompts none were kept
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer(), drafter_quantization="int8")
    weights = sum(p.nbytes for p in decoder.target.model.parameters())
    assert decoder.memory == Memory(weights, 0, 0)  # asking quantizes nothing
    decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY)
    # 2 layers, keys and values, 2 KV heads of 8 float32: two prompts and what may follow them.
    kept = 2 * 2 * 2 * 8 * 4 * (len(TARGET_PROMPT) + len(DRAFT_PROMPT) + 2 * 40)
    int8 = quantized_nbytes(decoder.draft_runner.model)
    assert decoder.memory == Memory(weights, int8, kept)
    assert 0 < int8 < weights / 3
    decoder.clear_cache()
    assert decoder.memory.kept_kv == 0

    other = tiny_model("qwen3", seed=1)
    pair = RapidDecoder(tiny_model(), tiny_tokenizer(), other)
    assert pair.memory.drafter_weights == sum(p.nbytes for p in other.parameters())


# --- a guest in other programs -----------------------------------------------------------------


def test_a_copy_of_a_decoder_is_the_decoder() -> None:
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    assert copy.deepcopy(decoder) is copy.copy(decoder) is decoder


@pytest.mark.parametrize("asked", [False, True])
def test_a_pickled_decoder_answers_as_the_first(asked: bool) -> None:
    decoder = RapidDecoder(
        tiny_model(), tiny_tokenizer(), tiny_model(seed=1), drafter_quantization="int8"
    )
    sampling = SamplingParams(max_new_tokens=8)
    if asked:
        decoder.generate(TARGET_PROMPT, [5, 6], sampling=sampling)
    opened = pickle.loads(pickle.dumps(decoder))
    expected = decoder.generate(TARGET_PROMPT, [5, 6], sampling=sampling)
    assert opened.generate(TARGET_PROMPT, [5, 6], sampling=sampling).token_ids == expected.token_ids


def test_a_pickled_decoder_has_the_tokenizer_that_it_was_made_with() -> None:
    tokenizer = tiny_tokenizer()
    decoder = RapidDecoder(tiny_model(), tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    opened = pickle.loads(pickle.dumps(decoder))
    assert opened.tokenizer.chat_template == decoder.tokenizer.chat_template is None


def test_a_decoder_that_was_loaded_by_name_is_pickled_as_the_name(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    decoder = RapidDecoder.from_pretrained(tmp_path, dtype="float32")
    pickled = pickle.dumps(decoder)
    assert len(pickled) < 2000
    assert pickle.loads(pickled).target.model is decoder.target.model  # weights are shared


def test_what_a_caller_does_to_the_tokenizer_is_not_the_decoders() -> None:
    tokenizer = tiny_tokenizer()
    decoder = RapidDecoder(tiny_model(), tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(2)
    result = decoder.generate("w5 w6 w7 w8 w9", sampling=SamplingParams(max_new_tokens=1))
    assert result.stats.prompt_tokens >= 5
