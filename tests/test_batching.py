"""Many requests at once: the tokens of each alone, documents read once, nobody disturbed."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import string
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial, partialmethod
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import threads, tiny_model, tiny_tokenizer
from grammar_models import piece_tokenizer
from scipy.stats import chi2_contingency

from rapid_llm.batching import GenerationRequest, Scheduler, rounds
from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.device import Device
from rapid_llm.engine.kv_cache import kv_nbytes
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.parts import Part
from rapid_llm.engine.session import Session
from rapid_llm.errors import (
    ContextWindowError,
    GenerationTimeoutError,
    InvalidParameterError,
    ModelError,
    NumericalError,
)
from rapid_llm.generation_factory import GenerationFactory
from rapid_llm.results import Delta

LEAN = ["llama", "qwen2", "qwen2-sliding", "qwen3", "mistral", "mistral-sliding"]
CHUNK = 16
DOCUMENTS = [[3 + (i * 7 + d * 11) % 60 for i in range(50)] for d in range(3)]
PIECES = string.ascii_letters + string.digits + "_"  # and an end, 64 tokens in all
CONSTRAINT = {"regex": "XYZ[k-p]{3,12}_?"}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(Device, "prefill_chunk", CHUNK)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with threads(1):
        yield


def decoder_of(architecture: str = "llama", **options: Any) -> RapidDecoder:
    return RapidDecoder(tiny_model(architecture), piece_tokenizer(PIECES), **options)


def sampling(index: int = 0, **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 20, "seed": index, "ignore_eos": True} | changes)


def mixed(index: int, compressed: str = "streaming") -> GenerationRequest:
    """A request of any mode, sampling, constraint and length, on one of the documents."""
    mode = ("paper", "exact", "augmented")[index % 3]
    settings: dict[str, Any] = {
        "max_new_tokens": 5 + 2 * (index % 12),
        "temperature": (0, 1.0, 0.7)[(index // 3) % 3],
        "top_k": (0, 0, 9)[index % 3],
        "repetition_penalty": (None, None, None, 1.2)[index % 4],
        "ignore_eos": index % 6 != 5,
        "constraint": CONSTRAINT if index % 5 == 4 else None,
    }
    config: dict[str, Any] = {
        "gamma": 1 + index % 5,
        "mode": mode,
        "eta": 0 if mode == "exact" else 5.0,
        "lookup": bool(index % 2),
        "drafting": ("rag", "rag", "rest", compressed)[index % 4 if mode == "exact" else 0],
    }
    return GenerationRequest(
        DOCUMENTS[index % 3] + [5 + index % 50, 9],
        [31, 7, 44, 3 + index % 50] if index % 7 else None,
        sampling=sampling(index, **settings),
        speculation=SpeculationConfig(**config),
    )


def tokens_alone(decoder: RapidDecoder, request: GenerationRequest) -> list[int]:
    return decoder.generate(
        request.target_prompt,
        request.draft_prompt,
        sampling=request.sampling,
        speculation=request.speculation,
    ).token_ids


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """A list that gets the numbers of new tokens of each pass, one a sequence."""
    passes: list[list[int]] = []
    joined, alone = ModelRunner.joined, ModelRunner.__call__

    def spy_joined(runner: ModelRunner, parts: list[Part]) -> Any:
        passes.append([len(part.ids) for part in parts])
        return joined(runner, parts)

    def spy_alone(runner: ModelRunner, tokens: torch.Tensor, cache: Any, keep: int) -> Any:
        if not cache.prefix:
            passes.append([len(tokens)])
        return alone(runner, tokens, cache, keep)

    monkeypatch.setattr(ModelRunner, "joined", spy_joined)
    monkeypatch.setattr(ModelRunner, "__call__", spy_alone)
    return passes


@pytest.mark.parametrize("architecture", LEAN)
def test_requests_at_once_get_the_tokens_of_each_alone(architecture):
    decoder = decoder_of(architecture)
    compressed = "rest" if architecture.endswith("sliding") else "streaming"
    requests = [mixed(index, compressed) for index in range(12)]
    alone = [tokens_alone(decoder, request) for request in requests]
    decoder.clear_cache()
    scheduler = Scheduler(decoder, max_sequences=7)
    given_up = [
        scheduler.stream(
            DOCUMENTS[i] + [7],
            [31, 7],
            sampling=sampling(i),
            speculation=SpeculationConfig(gamma=2),
        )
        for i in range(3)
    ]
    next(given_up[1])
    stream = scheduler.stream_many(requests)
    found: list[list[int]] = [[] for _ in requests]
    for number, (index, delta) in enumerate(stream):
        found[index] += delta.token_ids
        if number == 5:
            for each in given_up:
                each.close()
    assert found == alone


def test_the_rounds_of_all_are_joined(monkeypatch, begins_with):
    begins_with(4)
    decoder = decoder_of()
    passes = count_passes(monkeypatch)
    requests = [
        GenerationRequest([5 + i, 6, 7], None, sampling=sampling(i, max_new_tokens=10))
        for i in range(4)
    ]
    Scheduler(decoder).generate_many(requests)
    decoding = [each for each in passes if set(each) == {1}]
    # While prompts are read, one between two rounds, fewer decode.
    assert max(map(len, decoding)) == 4
    assert sum(map(len, decoding)) == 40
    assert len(decoding) <= 13


def test_rests_of_many_prompts_are_read_by_one_pass_between_two_rounds(monkeypatch, begins_with):
    begins_with(4)
    monkeypatch.setattr(rounds, "MOST_READ", 20)
    decoder = decoder_of()
    passes = count_passes(monkeypatch)
    requests = [
        GenerationRequest(
            DOCUMENTS[0] + [5 + i] * 30, None, sampling=sampling(i, max_new_tokens=30)
        )
        for i in range(4)
    ]
    Scheduler(decoder).generate_many(requests)
    begun = next(at for at, each in enumerate(passes) if each == [1])
    reading = [at for at, each in enumerate(passes) if at > begun and max(each) > 1]
    assert len(reading) >= 6  # two passes for each rest
    assert all(later - earlier > 1 for earlier, later in pairwise(reading))


def test_a_joined_pass_has_no_more_tokens_than_its_limit(monkeypatch):
    monkeypatch.setattr(rounds, "MOST_DECODED", 7)
    decoder = decoder_of()
    passes = count_passes(monkeypatch)
    speculation = SpeculationConfig(gamma=2, lookup=False)
    requests = [
        GenerationRequest(
            [5 + i, 6, 7],
            [8, 9 + i],
            sampling=sampling(i, max_new_tokens=10),
            speculation=speculation,
        )
        for i in range(5)
    ]
    Scheduler(decoder).generate_many(requests)
    verifying = [each for each in passes if len(each) > 1 and 3 in each]
    assert verifying
    assert max(map(sum, verifying)) <= 7


def test_drafters_step_together_and_drafts_are_verified_in_one_pass(monkeypatch, begins_with):
    begins_with(3)
    decoder = decoder_of()
    requests = [
        GenerationRequest(
            DOCUMENTS[0] + [5 + i],
            [31, 7, 5 + i],
            sampling=sampling(i, max_new_tokens=12, temperature=1.0),
            speculation=SpeculationConfig(gamma=2 + i, lookup=False),
        )
        for i in range(3)
    ]
    passes = count_passes(monkeypatch)
    Scheduler(decoder).generate_many(requests)
    assert [3, 4, 5] in passes  # a verification, each with its own γ
    assert any(len(each) == 3 and max(each) <= 2 for each in passes)  # a draft step of all


def test_a_document_is_read_once_and_held_once(monkeypatch):
    decoder = decoder_of()
    passes = count_passes(monkeypatch)
    held: list[int] = []
    joined = ModelRunner.joined

    def spy(runner: ModelRunner, parts: list[Part]) -> Any:
        result = joined(runner, parts)
        if len(parts) == 8:
            held.append(sum(part.cache.nbytes for part in parts))
        return result

    monkeypatch.setattr(ModelRunner, "joined", spy)
    new = 30
    requests = [
        GenerationRequest(DOCUMENTS[0] + [5 + i, 9], None, sampling=sampling(i, max_new_tokens=new))
        for i in range(8)
    ]
    results = Scheduler(decoder).generate_many(requests)
    whole, shared = len(DOCUMENTS[0]) + 1, len(DOCUMENTS[0])
    assert [n for each in passes for n in each if n > 1] == [CHUNK] * 3 + [whole - 3 * CHUNK]
    assert [each.stats.cached_tokens for each in results] == [0] + [shared] * 7
    runner = decoder.target
    document, tail = (
        kv_nbytes(runner.config, runner.model.dtype, capacity)
        for capacity in (whole + 1 + new, whole + 1 + new - shared)
    )
    assert held
    assert max(held) == document + 7 * tail


def test_the_same_question_at_once_reads_its_prompt_once_and_answers_as_alone(monkeypatch):
    decoder = decoder_of()
    request = GenerationRequest(
        [*DOCUMENTS[0], 9, 8], DOCUMENTS[1], sampling=sampling(),
        speculation=SpeculationConfig(gamma=3, lookup=False),
    )  # fmt: skip
    alone = tokens_alone(decoder_of(), request)
    reads = []
    run = Session.reading

    def spy(session: Session, tokens: list[int], progress: Any = None) -> Any:
        reads.append(len(tokens) - session.length)
        return run(session, tokens, progress)

    monkeypatch.setattr(Session, "reading", spy)
    results = Scheduler(decoder).generate_many([request] * 4)
    assert [each.token_ids for each in results] == [alone] * 4
    of_drafts = [len(DOCUMENTS[1]) - 1] * 4
    assert sorted(reads) == [1] * 3 + of_drafts + [len(DOCUMENTS[0]) + 1]


def test_prompts_of_one_token_are_answered_beside_others():
    decoder = decoder_of()
    prompts = ([7], [7, 9], DOCUMENTS[0], [7], [9])
    requests = [
        GenerationRequest(prompt, prompt[:1], sampling=sampling(index))
        for index, prompt in enumerate(prompts)
    ]
    alone = [tokens_alone(decoder_of(), request) for request in requests]
    results = Scheduler(decoder).generate_many(requests)
    assert [each.token_ids for each in results] == alone


def test_kv_kept_by_an_earlier_call_is_shared_and_stays(monkeypatch):
    decoder = decoder_of()
    first = decoder.generate(DOCUMENTS[0] + [5, 9], sampling=sampling())
    request = GenerationRequest(DOCUMENTS[0] + [6, 9], None, sampling=sampling())
    assert first.stats.cached_tokens == 0
    alone = tokens_alone(decoder_of(), request)
    for _ in range(2):
        results = Scheduler(decoder).generate_many([request] * 3)
        assert [each.stats.cached_tokens // CHUNK for each in results] == [3] * 3
        assert [each.token_ids for each in results] == [alone] * 3


def test_a_single_call_beside_a_batch_leaves_what_is_borrowed_alone():
    decoder = decoder_of()
    request = GenerationRequest(DOCUMENTS[0] + [6, 9], None, sampling=sampling(max_new_tokens=60))
    expected = tokens_alone(decoder, request)
    stream = Scheduler(decoder).stream(request.target_prompt, sampling=request.sampling)
    tokens = list(next(stream).token_ids)
    # The call would take the kept cache over and write behind the beginning that it shares.
    other = DOCUMENTS[0][:20] + [40, 41, 42] * 9
    decoder.generate(other, sampling=sampling(max_new_tokens=60))
    tokens += [token for delta in stream for token in delta.token_ids]
    assert tokens == expected


def test_kv_of_joined_passes_is_lent_but_neither_copied_nor_kept():
    """Joined passes round differently, and single calls are repeatable to the bit."""
    decoder = decoder_of()
    prefixes, runner = decoder._prefixes, decoder.target
    prompt = [*DOCUMENTS[0], *range(5, 45)]
    with ExitStack() as leases:

        def read(tokens: list[int], *, share: bool) -> int:
            capacity = len(tokens) + 9
            held = leases.enter_context(prefixes.lease(runner, tokens, capacity, share=share))
            Session(runner, held.cache, tokens).prefill(tokens[:-1])
            return held.reused

        assert read([*DOCUMENTS[0], 1], share=True) == 0
        assert read(prompt, share=True) == len(DOCUMENTS[0]) - 1  # but for the first one's last
        assert read([*prompt, 2], share=True) == len(prompt) - 2
        assert read([*prompt, 2], share=False) == 3 * CHUNK  # what a prefill's passes have read


def test_kv_that_a_changed_model_reads_again_in_a_batch_is_kept_as_far_as_it_is_exact():
    """What was borrowed to the token is read again by passes that no prefill runs."""
    decoder = decoder_of()
    prefixes, runner = decoder._prefixes, decoder.target
    prompt = [*DOCUMENTS[0], *range(5, 45)]
    first = [*DOCUMENTS[0], 1]
    with prefixes.lease(runner, first, 60, share=True) as lender:
        Session(runner, lender.cache, first).prefill(first[:-1])
        with prefixes.lease(runner, prompt, 100, share=True) as held:
            assert held.reused % CHUNK != 0
            with torch.no_grad():
                runner.model.model.layers[0].self_attn.k_proj.weight.mul_(2)
            Session(runner, held.cache, prompt).prefill(prompt[:-1])
            assert not held.cache.prefix
    with prefixes.lease(runner, prompt, 100) as again:
        assert again.reused == held.reused // CHUNK * CHUNK


@pytest.mark.parametrize(("question", "longer"), [(True, True), (False, False)])
def test_a_single_call_moves_and_changes_nothing_that_a_batch_borrows(question, longer):
    """Passes under way hold its addresses, and a drafter may read a prompt's last token again."""
    decoder = decoder_of()
    prefixes, runner = decoder._prefixes, decoder.target
    prompt = DOCUMENTS[0][:-1] + [6] * question
    with prefixes.lease(runner, DOCUMENTS[0][:-1], 60) as first:
        Session(runner, first.cache, DOCUMENTS[0]).prefill(DOCUMENTS[0][:-2])
    with prefixes.lease(runner, DOCUMENTS[0][:-1], 60, share=True) as borrower:
        (lent,) = borrower.cache.prefix
        assert lent.cache is first.cache
        before = [layer.keys.data_ptr() for layer in lent.cache.layers]
        with prefixes.lease(runner, prompt, 80 if longer else 60) as call:
            assert call.reused == lent.end
            assert call.cache is not lent.cache
            call.cache.rollback(len(prompt) - 2)
            assert [layer.keys.data_ptr() for layer in lent.cache.layers] == before


def test_models_that_cannot_join_are_run_one_by_one_and_the_log_says_so_once(caplog):
    decoder = decoder_of("granite")
    requests = [mixed(index) for index in (0, 1, 4, 5)]
    alone = [tokens_alone(decoder, request) for request in requests]
    scheduler = Scheduler(decoder)
    with caplog.at_level(logging.WARNING, logger="rapid_llm.batching"):
        for _ in range(2):
            results = scheduler.generate_many(requests)
            assert [each.token_ids for each in results] == alone
    assert [record.getMessage().count("one by one") for record in caplog.records] == [1]


def test_an_error_in_one_leaves_the_others_untouched():
    decoder = decoder_of()
    requests = [mixed(index) for index in range(6)]
    alone = [tokens_alone(decoder, request) for request in requests]

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    broken = GenerationRequest(DOCUMENTS[1] + [8], None, sampling=sampling(), progress=stop)
    late = GenerationRequest(DOCUMENTS[2] + [8], None, sampling=sampling(timeout=1e-9))
    scheduler = Scheduler(decoder)
    results = scheduler.generate_many([*requests, broken, late], return_exceptions=True)
    assert [getattr(each, "token_ids", None) for each in results[:6]] == alone
    assert isinstance(results[6], RuntimeError)
    assert isinstance(results[7], GenerationTimeoutError)
    with pytest.raises(RuntimeError, match="stopped"):
        scheduler.generate_many([*requests, broken])
    assert scheduler.generate_many(requests[:1])[0].token_ids == alone[0]


def test_nan_in_one_leaves_the_others_untouched(monkeypatch):
    decoder = decoder_of()
    requests = [
        GenerationRequest(DOCUMENTS[0] + [5 + i], None, sampling=sampling(i, temperature=1.0))
        for i in range(4)
    ]
    alone = [tokens_alone(decoder, request) for request in requests]
    joined = ModelRunner.joined

    def spoilt(runner: ModelRunner, parts: list[Part]) -> Any:
        results = joined(runner, parts)
        if len(parts) == 4:
            results[2] = results[2] * float("nan")
        return results

    monkeypatch.setattr(ModelRunner, "joined", spoilt)
    results = Scheduler(decoder).generate_many(requests, return_exceptions=True)
    assert isinstance(results.pop(2), NumericalError)
    assert [getattr(each, "token_ids", None) for each in results] == alone[:2] + alone[3:]


def test_a_joined_pass_that_fails_is_run_one_by_one(monkeypatch):
    decoder = decoder_of()
    requests = [mixed(index) for index in range(4)]
    alone = [tokens_alone(decoder, request) for request in requests]

    def fail(wanted: Any) -> Any:
        raise torch.OutOfMemoryError("no memory for so many")

    monkeypatch.setattr("rapid_llm.batching.rounds.extend_all", fail)
    assert [e.token_ids for e in Scheduler(decoder).generate_many(requests)] == alone


def test_a_request_that_finds_no_memory_waits_for_another_to_end(monkeypatch):
    decoder = decoder_of()
    requests = [mixed(index) for index in (0, 1, 4, 6, 9)]
    alone = [tokens_alone(decoder, request) for request in requests]
    opened, under_way, room = GenerationFactory.open, [0], 2
    counts: list[int] = []
    prompts: list[list[int]] = []

    @contextmanager
    def limited(
        self: GenerationFactory, request: Any, started: float, *, joined: bool = False
    ) -> Any:
        if under_way[0] == room:
            raise torch.OutOfMemoryError("room for two")
        under_way[0] += 1
        counts.append(under_way[0])
        prompts.append(request.prompt)
        try:
            with opened(self, request, started, joined=joined) as generation:
                yield generation
        finally:
            under_way[0] -= 1

    monkeypatch.setattr(GenerationFactory, "open", limited)
    scheduler = Scheduler(decoder)
    assert [each.token_ids for each in scheduler.generate_many(requests)] == alone
    in_order = [decoder.request(*each.prompts, **each.options).prompt for each in requests]
    assert prompts == in_order  # those that found no memory were the next ones
    assert max(counts) == 2
    _settle(scheduler)
    room = 9  # memory is there again
    scheduler.generate_many(requests)
    assert max(counts) > 2
    _settle(scheduler)
    room = 2
    under_way[0] = 2
    with pytest.raises(torch.OutOfMemoryError, match="room for two"):
        scheduler.generate_many(requests[:1])


def test_requests_that_leave_each_other_no_memory_are_answered_in_turn(monkeypatch):
    decoder = decoder_of()
    requests = [GenerationRequest([5 + i], sampling=sampling(i, max_new_tokens=1)) for i in (0, 1)]
    alone = [tokens_alone(decoder, request) for request in requests]
    opened, extend, under_way = GenerationFactory.open, Session.extend, [0]
    both_asked = threading.Event()

    @contextmanager
    def counted(*args: Any, **options: Any) -> Any:
        assert both_asked.wait(60)
        under_way[0] += 1
        try:
            with opened(*args, **options) as generation:
                yield generation
        finally:
            under_way[0] -= 1

    def room_for_one(run: Callable[..., Any], *args: Any) -> Any:
        if under_way[0] > 1:
            raise torch.OutOfMemoryError("room for one")
        return run(*args)

    monkeypatch.setattr(GenerationFactory, "open", counted)
    monkeypatch.setattr(Session, "extend", partialmethod(lambda *a: room_for_one(extend, *a)))
    monkeypatch.setattr(rounds, "extend_all", partial(room_for_one, rounds.extend_all))
    scheduler = Scheduler(decoder)
    streams = [scheduler.stream(*each.prompts, **each.options) for each in requests]
    both_asked.set()
    tokens = [[t for delta in stream for t in delta.token_ids] for stream in streams]
    assert tokens == alone


def test_weights_that_change_are_noticed_by_all():
    decoder = decoder_of()
    requests = [
        GenerationRequest(DOCUMENTS[0] + [5 + i], None, sampling=sampling(i, max_new_tokens=60))
        for i in range(3)
    ]
    stream = Scheduler(decoder).stream_many(requests)
    for _ in range(20):
        next(stream)
    with decoder.target.lock, torch.no_grad():
        decoder.target.model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    ends = [delta.finish_reason for _, delta in stream if delta.finish_reason is not None]
    assert ends == ["length"] * 3


def test_more_requests_than_may_run_wait_in_their_order():
    scheduler = Scheduler(decoder_of(), max_sequences=2)
    order: list[int] = []
    requests = [
        GenerationRequest(
            [5 + i, 6],
            None,
            sampling=sampling(max_new_tokens=8),
            progress=lambda *_, i=i: order.append(i),
        )
        for i in range(6)
    ]
    most, running = 0, set()
    for index, delta in scheduler.stream_many(requests):
        running.add(index)
        most = max(most, len(scheduler._running))
        if delta.finish_reason is not None:
            running.discard(index)
    assert list(dict.fromkeys(order)) == list(range(6))
    assert most <= 2


@pytest.mark.parametrize("limit", [0, -1, 1.5, "many"])
def test_a_wrong_limit_is_refused(limit):
    with pytest.raises(InvalidParameterError, match=f"max_sequences={limit!r}"):
        Scheduler(decoder_of(), max_sequences=limit)
    with pytest.raises(InvalidParameterError, match=f"max_sequences={limit!r}"):
        decoder_of(max_sequences=limit)


def test_a_decoder_has_one_scheduler_while_it_is_used_and_goes_with_it():
    decoder = decoder_of(max_sequences=3)
    scheduler = decoder.scheduler
    assert decoder.scheduler is scheduler
    assert scheduler.max_sequences == 3
    results = decoder.generate_many([mixed(0), mixed(1)])
    alone = [tokens_alone(decoder, mixed(0)), tokens_alone(decoder, mixed(1))]
    assert [each.token_ids for each in results] == alone
    _settle(scheduler)
    decoder = weakref.ref(decoder)
    del scheduler
    assert decoder() is None


def test_a_limit_of_one_runs_the_passes_of_single_calls(monkeypatch):
    decoder = decoder_of(max_sequences=1)
    requests = [mixed(0), mixed(6)]
    for request in requests:
        tokens_alone(decoder, request)  # the document's KV is kept
    passes = count_passes(monkeypatch)
    for request in requests:
        tokens_alone(decoder, request)
    alone = list(passes)
    passes.clear()
    decoder.generate_many(requests)
    assert passes == alone


def test_wrong_requests_have_their_errors_in_their_places():
    decoder = decoder_of()
    long = GenerationRequest([5] * 600, None, sampling=sampling())
    found = decoder.generate_many([mixed(0), long], return_exceptions=True)
    assert getattr(found[0], "token_ids", None) == tokens_alone(decoder, mixed(0))
    assert isinstance(found[1], ContextWindowError)


def test_a_wrong_request_is_refused_before_any_begins(monkeypatch):
    passes = count_passes(monkeypatch)
    scheduler = Scheduler(decoder_of())
    with pytest.raises(InvalidParameterError, match="both None"):
        scheduler.generate_many([mixed(0), GenerationRequest(None)])
    assert passes == []
    assert scheduler.generate_many([]) == []


def test_tasks_stream_at_once_and_a_cancelled_one_disturbs_nobody():
    decoder = decoder_of()
    requests = [mixed(index) for index in range(6)]
    alone = [tokens_alone(decoder, request) for request in requests]
    scheduler = Scheduler(decoder)

    async def answer(request: GenerationRequest) -> list[int]:
        stream = scheduler.astream(
            request.target_prompt,
            request.draft_prompt,
            sampling=request.sampling,
            speculation=request.speculation,
        )
        return [token async for delta in stream for token in delta.token_ids]

    async def main() -> list[list[int]]:
        endless = GenerationRequest(DOCUMENTS[0], None, sampling=sampling(max_new_tokens=400))
        given_up = asyncio.create_task(answer(endless))
        tasks = [asyncio.create_task(answer(request)) for request in requests]
        await asyncio.sleep(0.05)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == alone


def test_a_dropped_stream_and_its_memory_are_given_up():
    decoder = decoder_of(kv_cache_bytes=0)
    scheduler = Scheduler(decoder)
    stream = scheduler.stream(DOCUMENTS[0], sampling=sampling(max_new_tokens=450))
    next(stream)
    del stream
    gc.collect()
    result = scheduler.generate(DOCUMENTS[1], sampling=sampling())
    assert len(result.token_ids) == 20
    _settle(scheduler)
    assert scheduler._running == []
    assert decoder._prefixes._reading == []


def _settle(scheduler: Scheduler) -> None:
    """Wait until the scheduler's thread has ended."""
    thread = scheduler._thread
    if thread is not None:
        thread.join(60)
        assert not thread.is_alive()


def many_requests(count: int, workers: int) -> None:
    """Requests by threads and tasks, of which some are given up; the others are as alone."""
    decoder = decoder_of()
    kinds = [mixed(index) for index in range(36)]
    alone = [tokens_alone(decoder, request) for request in kinds]
    scheduler = Scheduler(decoder, max_sequences=6)
    wrong: list[int] = []

    def arguments(index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        r = kinds[index % 36]
        return (r.target_prompt, r.draft_prompt), {
            "sampling": r.sampling,
            "speculation": r.speculation,
        }

    def in_thread(index: int) -> None:
        prompts, options = arguments(index)
        chance = random.Random(index)
        stream = scheduler.stream(*prompts, **options)
        tokens: list[int] = []
        for delta in stream:
            tokens += delta.token_ids
            if chance.random() < 0.05:
                stream.close()
                return
        if tokens != alone[index % 36]:
            wrong.append(index)

    async def in_task(index: int) -> None:
        prompts, options = arguments(index)
        chance = random.Random(index)
        stream = scheduler.astream(*prompts, **options)
        tokens: list[int] = []
        async for delta in stream:
            tokens += delta.token_ids
            if chance.random() < 0.05:
                await stream.aclose()
                return
        if tokens != alone[index % 36]:
            wrong.append(index)

    async def tasks(indices: range) -> None:
        slots = asyncio.Semaphore(workers)

        async def one(index: int) -> None:
            async with slots:
                await in_task(index)

        await asyncio.gather(*map(one, indices))

    loop = threading.Thread(target=lambda: asyncio.run(tasks(range(0, count, 2))))
    loop.start()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(in_thread, range(1, count, 2)))
    loop.join()
    assert wrong == []
    _settle(scheduler)
    assert (scheduler._waiting, scheduler._running) == ([], [])
    assert decoder._prefixes._reading == []


def test_threads_and_tasks_get_what_they_get_alone():
    many_requests(48, workers=6)


@pytest.mark.slow
def test_a_thousand_requests_of_threads_and_tasks_get_what_they_get_alone():
    many_requests(1000, workers=16)


def pairs_in_a_batch(neighbours: Callable[[int], list[GenerationRequest]], runs: int) -> Any:
    shape = {"vocab_size": 6, "num_hidden_layers": 1, "initializer_range": 0.2}
    decoder = RapidDecoder(tiny_model(seed=3, **shape), tiny_tokenizer(6), tiny_model(**shape))
    scheduler = Scheduler(decoder)
    return [
        tuple(tuple(each.token_ids) for each in scheduler.generate_many(neighbours(run)))
        for run in range(runs)
    ]


def of_two_tokens(seed: int) -> GenerationRequest:
    config = SpeculationConfig(gamma=1, eta=5.0, lookup=False)
    settings = sampling(seed, max_new_tokens=2, temperature=1.0)
    return GenerationRequest([3, 5, 4], [4], sampling=settings, speculation=config)


@pytest.mark.slow
def test_answers_in_a_batch_follow_the_law_and_are_independent():
    """Four neighbours: each has the distribution of single calls, and no two are related."""
    runs = 1500
    found = pairs_in_a_batch(lambda run: [of_two_tokens(4 * run + i) for i in range(4)], runs)
    shape = {"vocab_size": 6, "num_hidden_layers": 1, "initializer_range": 0.2}
    decoder = RapidDecoder(tiny_model(seed=3, **shape), tiny_tokenizer(6), tiny_model(**shape))
    alone = [tuple(tokens_alone(decoder, of_two_tokens(10**6 + i))) for i in range(4 * runs)]
    together = [each for batch in found for each in batch]
    answers = sorted(set(alone) | set(together))
    table = [[side.count(answer) for answer in answers] for side in (together, alone)]
    common = [column for column in zip(*table, strict=True) if sum(column) >= 20]
    assert chi2_contingency(list(zip(*common, strict=True))).pvalue > 1e-3
    for one, other in ((0, 1), (1, 3)):
        counts = [[0] * 6 for _ in range(6)]
        for batch in found:
            counts[batch[one][0]][batch[other][0]] += 1
        assert chi2_contingency(counts).pvalue > 1e-3


def test_gamma_follows_what_a_round_of_all_costs(monkeypatch, begins_with):
    """A row costs as much as a pass: beside others nothing is drafted."""
    from rapid_llm.engine.costs import PassCost
    from rapid_llm.speculation.drafters import rag

    costs = {"rapid_llm.generation.pass_cost": PassCost(1.0, 0.3)}
    for name, cost in costs.items():
        monkeypatch.setattr(name, lambda session, cost=cost: cost)
    monkeypatch.setattr(rag, "pass_cost", lambda session: PassCost(0.05, 0.01))
    config = SpeculationConfig(mode="exact", lookup=False)
    decoder = decoder_of()
    requests = [
        GenerationRequest(
            DOCUMENTS[0] + [5 + i], DOCUMENTS[0] + [5 + i], sampling=sampling(i), speculation=config
        )
        for i in range(8)
    ]
    single = Scheduler(decoder).generate_many(requests[:1])[0].stats
    begins_with(8)
    crowd = Scheduler(decoder).generate_many(requests)
    assert single.drafted_tokens / single.rounds > 3
    # The first one is alone while the prompts of the others are read.
    assert crowd[0].stats.drafted_tokens < single.drafted_tokens
    assert all(2 * each.stats.drafted_tokens < single.drafted_tokens for each in crowd[1:])


def test_a_closed_stream_gives_no_more():
    scheduler = Scheduler(decoder_of())
    stream = scheduler.stream(DOCUMENTS[0], sampling=sampling(max_new_tokens=300))
    assert isinstance(next(stream), Delta)
    stream.close()
    assert list(stream) == []
    assert len(scheduler.generate(DOCUMENTS[0], sampling=sampling()).token_ids) == 20


def test_a_thread_that_waits_for_a_delta_of_a_stream_that_is_closed_goes_on():
    scheduler = Scheduler(decoder_of(), max_sequences=1)
    running = scheduler.stream(DOCUMENTS[0], sampling=sampling(max_new_tokens=450))
    next(running)
    waiting = scheduler.stream(DOCUMENTS[1], sampling=sampling())
    got: list[list[Delta]] = []
    consumer = threading.Thread(target=lambda: got.append(list(waiting)), daemon=True)
    consumer.start()
    waiting.close()
    consumer.join(30)
    running.close()
    assert got == [[]]


def test_requests_are_answered_after_a_thread_could_not_be_started(monkeypatch):
    scheduler = Scheduler(decoder_of())

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            scheduler.generate(DOCUMENTS[0], sampling=sampling())
    assert scheduler._waiting == []
    assert len(scheduler.generate(DOCUMENTS[0], sampling=sampling()).token_ids) == 20


def test_a_request_that_cannot_be_ended_properly_stops_nobody_else(monkeypatch):
    decoder = decoder_of()
    scheduler = Scheduler(decoder)
    released, failed = decoder._prefixes._release, []

    def release(reading: Any) -> None:
        released(reading)
        if len(reading.tokens) == len(DOCUMENTS[1]):
            failed.append(reading)
            raise RuntimeError("spoilt")

    monkeypatch.setattr(decoder._prefixes, "_release", release)
    other = scheduler.stream(DOCUMENTS[0], sampling=sampling(max_new_tokens=100))
    dropped = scheduler.stream([*DOCUMENTS[1], 5], sampling=sampling(max_new_tokens=450))
    next(dropped)
    dropped.close()
    assert sum(len(delta.token_ids) for delta in other) == 100
    assert len(failed) == 1


def test_a_model_that_is_refused_later_stops_only_its_own_requests(monkeypatch):
    """Its errors come from its passes, and not where the scheduler asks about it."""
    decoder = RapidDecoder(tiny_model(), piece_tokenizer(PIECES), tiny_model(seed=1))
    requests = [
        GenerationRequest(DOCUMENTS[0], None, sampling=sampling(0)),
        GenerationRequest(None, DOCUMENTS[1], sampling=sampling(1)),
        GenerationRequest(DOCUMENTS[2], None, sampling=sampling(2)),
    ]
    alone = [tokens_alone(decoder, request) for request in requests]
    refresh = ModelRunner._refresh

    def refuse(runner: ModelRunner) -> None:
        if runner is decoder.drafter:
            raise ModelError("an adapter of another kind")
        refresh(runner)

    monkeypatch.setattr(ModelRunner, "_refresh", refuse)
    first, refused, last = decoder.generate_many(requests, return_exceptions=True)
    assert isinstance(refused, ModelError)
    assert [first.token_ids, last.token_ids] == [alone[0], alone[2]]


def test_a_callback_that_asks_the_scheduler_is_refused_instead_of_waiting_for_itself():
    decoder = decoder_of()
    scheduler = Scheduler(decoder)

    def ask(*_: Any) -> None:
        scheduler.generate(DOCUMENTS[1], sampling=sampling())

    with pytest.raises(InvalidParameterError, match="wait for itself"):
        scheduler.generate(DOCUMENTS[0], sampling=sampling(), progress=ask)
    assert len(scheduler.generate(DOCUMENTS[0], sampling=sampling()).token_ids) == 20


def test_a_long_queue_on_a_document_that_is_being_read_is_not_looked_through(monkeypatch):
    """A look takes a millisecond: it must not be taken at each of thousands, between passes."""
    looks: list[int] = []
    will_borrow, take = Scheduler._will_borrow, Scheduler._next

    def look(scheduler: Scheduler, ticket: Any) -> bool:
        looks[-1] += 1
        return will_borrow(scheduler, ticket)

    def count(scheduler: Scheduler) -> Any:
        looks.append(0)
        return take(scheduler)

    monkeypatch.setattr(Scheduler, "_will_borrow", look)
    monkeypatch.setattr(Scheduler, "_next", count)
    requests = [
        GenerationRequest([*DOCUMENTS[0], 3 + i], None, sampling=sampling(i, max_new_tokens=2))
        for i in range(20)
    ]
    results = Scheduler(decoder_of(), max_sequences=3).generate_many(requests)
    assert [len(each.token_ids) for each in results] == [2] * 20
    assert max(looks) == 3
