"""KV of prompts kept between calls, bounded, and given up where memory is short."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import weakref

import pytest
import torch
from conftest import counting_model, tiny_model, tiny_tokenizer
from decoding import EXACT, GREEDY, SAMPLED, CountedForward

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.cpu import quantizers
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache import prefixes
from rapid_llm.errors import InvalidParameterError
from rapid_llm.speculation.verification import verify

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
