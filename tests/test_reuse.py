"""KV reuse: logits are those of a fresh prefill, bit for bit, and few tokens are read again."""

from __future__ import annotations

import gc
import random
import threading

import pytest
import torch
from conftest import ARCHITECTURES, threads, tiny_model
from kept_prompts import (
    AMPLE,
    BYTES_PER_TOKEN,
    CHUNK,
    DOCUMENT,
    OTHER,
    ask,
    fresh,
    make_forward,
    read,
    say,
    text,
)

from rapid_llm.engine.kv_cache import kv_nbytes
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache.prefixes import PrefixCache
from rapid_llm.engine.session import Session
from rapid_llm.errors import InvalidParameterError

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


@pytest.fixture
def runner() -> ModelRunner:
    return make_forward()


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch) -> None:
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", CHUNK)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_next_question_reads_only_itself(architecture, monkeypatch):
    runner = ModelRunner(tiny_model(architecture), "tiny")
    cache = PrefixCache(AMPLE)
    assert ask(cache, runner, [*DOCUMENT, 5, 6, 7]) == 0
    passes = []
    original = ModelRunner.__call__

    def spy(runner, tokens, cache, *args):
        passes.append(len(tokens))
        return original(runner, tokens, cache, *args)

    monkeypatch.setattr(ModelRunner, "__call__", spy)
    with cache.lease(runner, [*DOCUMENT, 8, 9], 70) as lease:
        logits = read(runner, [*DOCUMENT, 8, 9], lease)
    assert passes == [1, 1]
    assert torch.equal(logits, fresh(runner, [*DOCUMENT, 8, 9]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_planned_bytes_are_those_allocated(architecture):
    runner = ModelRunner(tiny_model(architecture), "tiny")
    cache = PrefixCache(AMPLE)
    ask(cache, runner, DOCUMENT, capacity=75)
    assert cache.nbytes == kv_nbytes(runner.config, runner.model.dtype, 75)


def test_all_but_the_last_token_is_reused_if_the_same_passes_would_read_it(runner):
    """Of the last one the logits are wanted."""
    cache = PrefixCache(AMPLE)
    assert ask(cache, runner, [*DOCUMENT, 5, 6]) == 0
    for length, reused in ((62, 61), (61, 60), (60, 50), (51, 50), (50, 40), (12, 10), (10, 0)):
        assert ask(cache, runner, [*DOCUMENT, 5, 6][:length]) == reused
        ask(cache, runner, [*DOCUMENT, 5, 6])  # a shorter prompt keeps less


@pytest.fixture
def pieces(monkeypatch) -> None:
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_pieces", (4, 2))


@pytest.mark.usefixtures("pieces")
def test_the_pieces_after_the_last_whole_chunk_are_reused_too(runner):
    """Passes of 10 tokens, then at most two of 4, one of 2 and one of 1."""
    cache = PrefixCache(AMPLE)
    assert ask(cache, runner, [*DOCUMENT[:58], 5]) == 0  # 50 | 54 | 58
    assert ask(cache, runner, [*DOCUMENT[:58], 6, 7]) == 58  # 50 | 54 | 58 | 59
    assert ask(cache, runner, [*DOCUMENT[:56], 8, 9]) == 54  # 50 | 54 | 56 | 57
    # A whole chunk in place of the pieces, and pieces in the place of a whole chunk.
    assert ask(cache, runner, [*DOCUMENT, 5, 6]) == 50
    assert ask(cache, runner, [*DOCUMENT[:58], 5]) == 50


@pytest.mark.usefixtures("pieces")
def test_prompts_of_any_lengths_get_the_logits_of_a_fresh_prefill(runner):
    cache, generator = PrefixCache(3 * 70 * BYTES_PER_TOKEN), random.Random(0)
    reused = []
    for _ in range(80):
        shared, new = generator.randrange(50, 62), generator.randrange(1, 4)
        prompt = [*DOCUMENT, *OTHER][:shared] + text(new, seed=generator.randrange(3))
        reused.append(ask(cache, runner, prompt))
    assert {n % CHUNK for n in reused} > {0, 4, 8}


@pytest.mark.usefixtures("pieces")
def test_an_interrupted_prefill_leaves_what_its_own_passes_read(runner, monkeypatch):
    """54 tokens of a prompt of 59, then of one of 55: 50 | 54 both."""
    cache = PrefixCache(AMPLE)
    prompt = [*DOCUMENT[:58], 5, 6]
    with cache.lease(runner, prompt, 70) as lease:
        session = Session(runner, lease.cache)
        original = Session.extend

        def fail(session, tokens, *args):
            if session.length == 54:
                raise torch.OutOfMemoryError
            return original(session, tokens, *args)

        with monkeypatch.context() as context, torch.inference_mode():
            context.setattr(Session, "extend", fail)
            with pytest.raises(torch.OutOfMemoryError):
                session.prefill(prompt[:-1])
    assert ask(cache, runner, DOCUMENT[:56]) == 54


@pytest.mark.usefixtures("pieces")
def test_kv_that_had_to_be_read_again_is_that_of_a_prefill(runner):
    """The model was changed during an answer: the prompt's own passes read it, not the length's."""
    cache, prompt, answer = PrefixCache(AMPLE), DOCUMENT[:58], text(8, seed=5)
    with cache.lease(runner, prompt, 70) as lease, torch.inference_mode():
        session = Session(runner, lease.cache, prompt)
        session.prefill(prompt[:-1])
        session.extend(torch.tensor([prompt[-1], *answer[:3]]))
        runner.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        session.extend(torch.tensor(answer[3:]))
        assert session.length == len(prompt) + len(answer)
    assert ask(cache, runner, [*DOCUMENT[:56], 7, 8]) == 56
    assert ask(cache, runner, [*DOCUMENT[:55], 7, 8]) == 54


@pytest.mark.usefixtures("pieces")
def test_the_last_token_read_is_not_copied_from_a_cache_in_use(runner):
    """A drafter may be reading it again."""
    cache = PrefixCache(AMPLE)
    with cache.lease(runner, [*DOCUMENT, 5], 70) as busy:
        read(runner, [*DOCUMENT, 5], busy)
        with torch.inference_mode():
            busy.cache.layers[0].keys[:, :, 59] = 0
        assert ask(cache, runner, [*DOCUMENT, 5]) == 50
        assert ask(cache, runner, [*DOCUMENT, 5], capacity=70) == 60


def test_what_departs_within_a_chunk_is_read_from_its_beginning(runner):
    cache = PrefixCache(AMPLE)
    ask(cache, runner, [*DOCUMENT, 5, 6])
    assert ask(cache, runner, [*DOCUMENT[:47], *OTHER]) == 40


def test_an_answer_is_read_again_in_the_next_turn_as_it_would_be_in_a_fresh_prefill(runner):
    """It was read token by token, or with drafts, and rounded otherwise."""
    cache = PrefixCache(AMPLE)
    answer = text(30, seed=4)
    for said in ([answer[:3], answer[3:]], [[token] for token in answer]):
        with cache.lease(runner, [*DOCUMENT, 5], 100) as lease:
            read(runner, [*DOCUMENT, 5], lease)
            for tokens in said:
                say(runner, lease, tokens)
        assert ask(cache, runner, [*DOCUMENT, 5, *answer, 6, 7]) == len(DOCUMENT)


def test_an_idle_cache_is_taken_over_in_place_and_grows_when_it_must(runner):
    cache = PrefixCache(AMPLE)
    with cache.lease(runner, [*DOCUMENT, 5], 80) as first:
        read(runner, [*DOCUMENT, 5], first)
    buffer = first.cache.layers[0].keys.data_ptr()
    with cache.lease(runner, [*DOCUMENT, 6], 80) as second:
        assert second.cache is first.cache
        assert second.cache.layers[0].keys.data_ptr() == buffer
        read(runner, [*DOCUMENT, 6], second)
    assert cache.nbytes == 80 * BYTES_PER_TOKEN
    assert ask(cache, runner, [*DOCUMENT, *OTHER[:40]]) == len(DOCUMENT)
    assert cache.nbytes == 100 * BYTES_PER_TOKEN


def test_documents_behind_one_system_prompt_are_both_kept(runner):
    system, cache = text(20, seed=9), PrefixCache(AMPLE)
    one, two = [*system, *DOCUMENT], [*system, *OTHER]
    assert ask(cache, runner, one) == 0
    assert ask(cache, runner, two) == len(system)
    assert ask(cache, runner, [*one, 5, 6]) == len(one) - CHUNK
    assert ask(cache, runner, [*two, 5, 6]) == len(two) - CHUNK
    assert cache.nbytes == (len(one) + len(two) + 4) * BYTES_PER_TOKEN


def test_a_cache_in_use_is_copied_as_far_as_it_has_been_read(runner):
    cache = PrefixCache(AMPLE)
    with cache.lease(runner, DOCUMENT, 70) as busy:
        with cache.lease(runner, DOCUMENT, 70) as early:
            assert early.reused == 0
        read(runner, DOCUMENT, busy, until=30)
        assert ask(cache, runner, [*DOCUMENT, 5]) == 30
        assert torch.equal(read(runner, DOCUMENT, busy), fresh(runner, DOCUMENT))
        say(runner, busy, [7, 8])
        cache.clear()  # or the idle one would be the better source
        # The owner has read the prompt's last tokens in a smaller pass, its answer in others.
        assert ask(cache, runner, [*DOCUMENT, 7, 8, 9], capacity=70) == 50
    # These were states of one document: the latest remains.
    assert cache.nbytes == 70 * BYTES_PER_TOKEN
    assert ask(cache, runner, [*DOCUMENT, 7, 8, 9, 10]) == 50


def test_without_a_budget_nothing_is_copied_from_a_cache_in_use(runner):
    cache = PrefixCache(0)
    with cache.lease(runner, DOCUMENT, 70) as busy:
        read(runner, DOCUMENT, busy)
        assert ask(cache, runner, DOCUMENT) == 0


def test_passes_that_round_otherwise_share_nothing(runner):
    cache = PrefixCache(AMPLE)
    ask(cache, runner, DOCUMENT)
    with (
        threads(torch.get_num_threads() + 1),
        cache.lease(runner, DOCUMENT, len(DOCUMENT)) as lease,
    ):
        assert lease.reused == 0
    assert ask(cache, runner, DOCUMENT) == 59


def test_what_was_read_before_an_error_is_reused(runner):
    cache = PrefixCache(AMPLE)

    def interrupted() -> None:
        with cache.lease(runner, DOCUMENT, 70) as lease:
            read(runner, DOCUMENT, lease, until=20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ask(cache, runner, DOCUMENT) == 20


def test_a_pass_that_fails_between_layers_leaves_what_was_before(runner, monkeypatch):
    cache = PrefixCache(AMPLE)
    with cache.lease(runner, DOCUMENT, 70) as lease:
        read(runner, DOCUMENT, lease, until=20)
        with monkeypatch.context() as context:
            context.setattr(lease.cache.layers[1], "update", None)
            with pytest.raises(TypeError):
                read(runner, DOCUMENT, lease)
        assert lease.cache.length == 20
    assert ask(cache, runner, DOCUMENT) == 20


def test_a_layer_that_is_ahead_during_a_pass_is_not_copied(runner, monkeypatch):
    cache, seen = PrefixCache(AMPLE), []
    with cache.lease(runner, DOCUMENT, 70) as lease:
        read(runner, DOCUMENT, lease, until=20)
        update = lease.cache.layers[1].update

        def meanwhile(*args):
            with cache.lease(runner, DOCUMENT, 70) as other:
                seen.append(other.reused)
            return update(*args)

        monkeypatch.setattr(lease.cache.layers[1], "update", meanwhile)
        assert torch.equal(read(runner, DOCUMENT, lease), fresh(runner, DOCUMENT))
    assert seen == [20, 30, 40, 50, 50]


def test_a_kept_cache_may_be_used_in_or_out_of_inference_mode(runner):
    cache = PrefixCache(AMPLE)
    ask(cache, runner, DOCUMENT)
    with torch.inference_mode():
        assert ask(cache, runner, [*DOCUMENT, 5, 6]) == 50  # grown in inference mode
    assert ask(cache, runner, [*DOCUMENT[:-1], 5, 6]) == 50
    assert ask(cache, runner, [*DOCUMENT, 5, 6, 7]) == 50


def test_an_abandoned_stream_gives_its_cache_back(runner):
    cache = PrefixCache(AMPLE)

    def stream():
        with cache.lease(runner, DOCUMENT, 70) as lease:
            read(runner, DOCUMENT, lease)
            yield

    chunks = stream()
    next(chunks)
    del chunks
    gc.collect()
    assert ask(cache, runner, DOCUMENT) == 59


def test_a_cache_that_was_never_filled_is_not_kept(runner):
    cache = PrefixCache(AMPLE)
    with cache.lease(runner, DOCUMENT, 70):
        pass
    assert cache.nbytes == 0
    assert ask(cache, runner, DOCUMENT) == 0


def test_the_least_recently_used_document_goes_first(runner):
    documents = [text(60, seed) for seed in (10, 11, 12)]
    cache = PrefixCache(2 * 70 * BYTES_PER_TOKEN)
    for document in documents[:2]:
        ask(cache, runner, document, capacity=70)
    assert ask(cache, runner, documents[0], capacity=70) == 59
    with cache.lease(runner, documents[2], 70) as lease:
        # Room is made before the new KV is allocated, not after.
        assert cache.nbytes == 70 * BYTES_PER_TOKEN
        read(runner, documents[2], lease)
    assert cache.nbytes == 2 * 70 * BYTES_PER_TOKEN
    assert ask(cache, runner, documents[0], capacity=70) == 59
    assert ask(cache, runner, documents[1], capacity=70) == 0
    assert cache.nbytes == 2 * 70 * BYTES_PER_TOKEN


def test_what_exceeds_the_budget_is_not_kept_and_drives_nothing_out(runner):
    cache = PrefixCache(70 * BYTES_PER_TOKEN)
    ask(cache, runner, DOCUMENT, capacity=70)
    assert ask(cache, runner, OTHER, capacity=71) == 0
    assert ask(cache, runner, OTHER, capacity=71) == 0
    assert ask(cache, runner, DOCUMENT, capacity=70) == 59
    nothing = PrefixCache(0)
    assert [ask(nothing, runner, DOCUMENT) for _ in range(2)] == [0, 0]
    assert nothing.nbytes == 0
    with pytest.raises(InvalidParameterError, match="kv_cache_bytes=-1"):
        PrefixCache(-1)


def test_clear_frees_what_is_idle(runner):
    cache = PrefixCache(AMPLE)
    ask(cache, runner, OTHER)
    with cache.lease(runner, DOCUMENT, 70) as busy:
        read(runner, DOCUMENT, busy, until=30)
        cache.clear()
        assert cache.nbytes == 0
        assert torch.equal(read(runner, DOCUMENT, busy), fresh(runner, DOCUMENT))
    assert ask(cache, runner, OTHER) == 0
    assert ask(cache, runner, DOCUMENT) == 59


def no_memory(*_: object) -> None:
    raise torch.OutOfMemoryError


def test_a_cache_that_cannot_grow_is_read_anew(runner, monkeypatch):
    cache = PrefixCache(AMPLE)
    ask(cache, runner, OTHER)
    ask(cache, runner, DOCUMENT)
    with monkeypatch.context() as context:
        context.setattr("rapid_llm.engine.kv_cache.KVCache.grow", no_memory)
        assert ask(cache, runner, DOCUMENT, capacity=90) == 0
    assert cache.nbytes == 90 * BYTES_PER_TOKEN  # what was idle had to go
    assert ask(cache, runner, DOCUMENT, capacity=90) == 59


def test_a_lease_that_finds_no_memory_spoils_nothing(runner, monkeypatch):
    cache = PrefixCache(AMPLE)
    with cache.lease(runner, DOCUMENT, 70) as busy:
        read(runner, DOCUMENT, busy, until=30)
        with monkeypatch.context() as context:
            context.setattr("rapid_llm.engine.kv_cache.KVCache.copy_prefix", no_memory)
            with pytest.raises(torch.OutOfMemoryError):
                ask(cache, runner, DOCUMENT)
        assert ask(cache, runner, DOCUMENT) == 30
        assert torch.equal(read(runner, DOCUMENT, busy), fresh(runner, DOCUMENT))


def test_models_do_not_share(runner):
    drafter = make_forward(seed=7)
    cache = PrefixCache(AMPLE)
    for _ in range(2):
        for model in (runner, drafter):
            ask(cache, model, DOCUMENT)
    assert ask(cache, drafter, DOCUMENT) == 59
    assert cache.nbytes == 2 * len(DOCUMENT) * BYTES_PER_TOKEN


def test_threads_get_the_logits_that_they_get_alone(runner):
    system = text(20, seed=20)
    documents = [[*system, *text(20 + 15 * i, seed=i)] for i in range(4)]
    expected = {}
    for i, document in enumerate(documents):
        for question in range(4):
            expected[i, question] = fresh(runner, [*document, 5 + question])
    cache = PrefixCache(2 * 90 * BYTES_PER_TOKEN)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        generator = random.Random(seed)
        try:
            for _ in range(40):
                i, question = generator.randrange(4), generator.randrange(4)
                prompt = [*documents[i], 5 + question]
                with cache.lease(runner, prompt, 90) as lease:
                    until = generator.randrange(lease.reused, len(prompt), CHUNK)
                    read(runner, prompt, lease, until=until)
                    if generator.random() < 0.3:
                        continue
                    logits = read(runner, prompt, lease)
                    assert torch.equal(logits, expected[i, question])
                    say(runner, lease, [seed + 3])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert 0 < cache.nbytes <= 2 * 90 * BYTES_PER_TOKEN
