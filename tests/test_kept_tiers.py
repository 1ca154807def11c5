"""Tiers of kept KV: what leaves a device comes back from the host, and from files after that.

The device is a CPU that is told that its memory is apart from the host's, and that counts what is
copied between them.
"""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Iterable

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model, tiny_tokenizer
from kept_prompts import (
    AMPLE,
    BYTES_PER_TOKEN,
    CHUNK,
    DOCUMENT,
    OTHER,
    ask,
    fresh,
    make_forward,
    origins,
    read,
    say,
    text,
)
from torch import Tensor

from rapid_llm.config import SamplingParams
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine import device as devices
from rapid_llm.engine.cpu.device import CPU
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache import host
from rapid_llm.engine.prefix_cache.prefixes import PrefixCache
from rapid_llm.errors import InvalidParameterError

ONE = 70 * BYTES_PER_TOKEN
"""Room on the device for one prompt of this file, for whose answers there is room."""


class Apart(CPU):
    """A CPU with memory apart from the host's.

    Attributes:
        copied: bytes of each call of ``transfer``.
        free: event that copies wait for.
        full: whether host buffers are refused.
    """

    own_memory = True

    def __init__(self) -> None:
        self.copied: list[int] = []
        self.free = threading.Event()
        self.free.set()
        self.full = False

    def host_buffer(self, nbytes: int) -> Tensor:
        if self.full:
            raise RuntimeError("CUDA error: out of memory")
        return super().host_buffer(nbytes).random_(0, 256)

    def transfer(
        self, pairs: Iterable[tuple[Tensor, Tensor]], device: torch.device, after: object
    ) -> None:
        assert self.free.wait(60)
        pairs = list(pairs)
        for source, target in pairs:
            assert source.is_contiguous()
            assert target.is_contiguous()
            assert source.nbytes == target.nbytes
        super().transfer(pairs, device, after)
        self.copied.append(sum(source.nbytes for source, _ in pairs))


@pytest.fixture
def apart(monkeypatch) -> Apart:
    apart = Apart()
    monkeypatch.setitem(devices._devices, "cpu", apart)
    monkeypatch.setattr(host, "PIECE", 1 << 10)  # rows of layers go over their borders
    return apart


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch) -> None:
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", CHUNK)


@pytest.fixture
def runner() -> ModelRunner:
    return make_forward()


def kept(runner: ModelRunner, budget: int = ONE, **options) -> PrefixCache:
    """A cache whose device had the document and has another one."""
    cache = PrefixCache(budget, host_bytes=AMPLE, **options)
    for document in (DOCUMENT, OTHER):
        assert origins(cache, runner, [*document, 5], 70) == {}
    cache._host.wait()
    return cache


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("apart")
def test_every_architecture_comes_back_from_the_host(architecture):
    runner = ModelRunner(tiny_model(architecture), "tiny")
    cache = PrefixCache(AMPLE, host_bytes=AMPLE)
    ask(cache, runner, [*DOCUMENT, 5])
    cache.free_devices()
    assert cache.nbytes == 0
    assert origins(cache, runner, [*DOCUMENT, 6, 7]) == {"host": 60}


@pytest.mark.usefixtures("apart")
def test_bfloat16_comes_back_as_it_was():
    runner = ModelRunner(tiny_model().to(torch.bfloat16), "tiny")
    cache = PrefixCache(AMPLE, host_bytes=AMPLE)
    assert ask(cache, runner, DOCUMENT) == 0
    cache.free_devices()
    assert origins(cache, runner, DOCUMENT) == {"host": 59}


def test_a_document_pushed_out_of_each_tier_comes_back_from_the_next(
    runner, apart, tmp_path, monkeypatch
):
    monkeypatch.setattr("rapid_llm.engine.prefix_cache.prefixes.WORTH_SAVING", 50)
    monkeypatch.setattr("rapid_llm.engine.prefix_cache.prefixes.WORTH_LOADING", 20)
    documents = [text(60, seed) for seed in range(10, 13)]
    cache = PrefixCache(ONE, tmp_path, host_bytes=ONE)  # of one document each

    passes: list[int] = []
    original = ModelRunner.__call__

    def spy(runner, tokens, cache, *args):
        passes.append(len(tokens))
        return original(runner, tokens, cache, *args)

    def question(document: int, *asked: int) -> tuple[dict[str, int], list[int], list[int]]:
        """Tokens reused by tier, passes, and bytes copied."""
        prompt = [*documents[document], *asked]
        expected = fresh(runner, prompt)
        before = len(apart.copied)
        with monkeypatch.context() as context:
            context.setattr(ModelRunner, "__call__", spy)
            passes.clear()
            with cache.lease(runner, prompt, 70) as lease:
                assert torch.equal(read(runner, prompt, lease), expected)
                reused = {tier: n for tier, n in lease.origins.items() if n}
        cache._host.wait()
        return reused, list(passes), apart.copied[before:]

    whole = 60 * BYTES_PER_TOKEN
    assert question(0, 5) == ({}, [10] * 6 + [1], [])
    assert question(0, 6, 7) == ({"device": 60}, [1, 1], [])
    # What goes to the host is the document with the question, but for its last token.
    assert question(1, 5) == ({}, [10] * 6 + [1], [whole + BYTES_PER_TOKEN])
    out, back = whole, whole
    assert question(0, 8, 9) == ({"host": 60}, [1, 1], [out, back])
    # The device drops it again, for the third, and the host has it still.
    assert question(2, 5) == ({}, [10] * 6 + [1], [whole + BYTES_PER_TOKEN])
    assert cache.nbytes <= ONE
    assert cache.host_nbytes <= ONE
    assert question(1, 6, 7)[0] == {"disk": 60}
    assert question(0, 6, 7)[0] == {"disk": 60}
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".safetensors"}
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_what_the_device_has_is_not_copied_to_it(runner, apart):
    system = text(20, seed=9)
    cache = PrefixCache(2 * ONE, host_bytes=AMPLE)
    ask(cache, runner, [*system, *DOCUMENT, 5])
    cache.free_devices()
    ask(cache, runner, [*system, *OTHER[:20], 5])
    apart.copied.clear()
    assert origins(cache, runner, [*system, *DOCUMENT, 6, 7]) == {"device": 20, "host": 60}
    assert apart.copied == [60 * BYTES_PER_TOKEN]


def test_what_is_on_the_host_is_not_copied_there_again(runner, apart):
    cache = kept(runner)
    held = cache.host_nbytes
    for question in range(5, 10):
        cache.free_devices()
        apart.copied.clear()
        assert origins(cache, runner, [*DOCUMENT, question, 5], 70) == {"host": 60}
        assert apart.copied == [60 * BYTES_PER_TOKEN]
    cache.free_devices()
    assert cache.host_nbytes == 2 * held  # and the other document
    # A longer one takes the place of what it begins with.
    longer = [*DOCUMENT, *OTHER, 5]
    assert origins(cache, runner, longer) == {"host": 60}
    cache.free_devices()
    assert held < cache.host_nbytes < 4 * held
    assert origins(cache, runner, longer) == {"host": 120}
    assert origins(cache, runner, [*DOCUMENT, 5]) == {"host": 60}


def test_a_device_that_copies_serves_others_meanwhile(runner, apart):
    cache = PrefixCache(ONE, host_bytes=AMPLE)
    ask(cache, runner, [*DOCUMENT, 5], 70)
    apart.free.clear()
    assert ask(cache, runner, [*OTHER, 5], 70) == 0
    assert ask(cache, runner, [*OTHER, 6], 70) == 60
    answers: list[dict[str, int]] = []
    asking = threading.Thread(
        target=lambda: answers.append(origins(cache, runner, [*DOCUMENT, 6], 70))
    )
    asking.start()
    asking.join(0.05)
    assert answers == []  # it waits for the copy rather than read the document again
    assert ask(cache, runner, [*text(30, seed=4), 6], 70) == 0
    apart.free.set()
    asking.join()
    assert answers == [{"host": 60}]


@pytest.mark.usefixtures("apart")
def test_a_device_keeps_nothing_of_what_has_left_it(runner):
    cache = PrefixCache(ONE, host_bytes=AMPLE)
    with cache.lease(runner, [*DOCUMENT, 5], 70) as lease:
        read(runner, [*DOCUMENT, 5], lease)
    gone = weakref.ref(lease.cache)
    del lease
    ask(cache, runner, [*OTHER, 5], 70)
    cache._host.wait()
    gc.collect()
    assert gone() is None
    assert origins(cache, runner, [*DOCUMENT, 6], 70) == {"host": 60}


@pytest.mark.usefixtures("apart")
def test_the_hosts_budget_holds_and_the_least_recently_used_leaves_first(runner):
    documents = [text(60, seed) for seed in range(20, 24)]
    cache = PrefixCache(ONE, host_bytes=2 * ONE)
    for document in (*documents[:3], documents[0], documents[3]):
        ask(cache, runner, [*document, 5], 70)
        assert cache.host_nbytes <= 2 * ONE
    # On the host are the first, which was asked about again, and the third.
    assert origins(cache, runner, [*documents[0], 6], 70) == {"host": 60}
    assert origins(cache, runner, [*documents[1], 6], 70) == {}
    small = PrefixCache(ONE, host_bytes=ONE // 2)
    for document in documents[:2]:
        ask(small, runner, [*document, 5], 70)
    assert small.host_nbytes == 0
    assert ask(small, runner, [*documents[0], 5], 70) == 0


@pytest.mark.usefixtures("apart")
def test_without_room_on_the_device_all_goes_to_the_host(runner):
    cache = PrefixCache(0, host_bytes=AMPLE)
    assert ask(cache, runner, [*DOCUMENT, 5]) == 0
    assert (cache.nbytes, cache.host_nbytes > 0) == (0, True)
    assert origins(cache, runner, [*DOCUMENT, 6]) == {"host": 60}
    nothing = PrefixCache(0)
    assert [ask(nothing, runner, [*DOCUMENT, 5]) for _ in range(2)] == [0, 0]
    assert nothing.host_nbytes == 0
    with pytest.raises(InvalidParameterError, match="kv_cache_host_bytes=-1"):
        PrefixCache(0, host_bytes=-1)


def test_where_the_host_has_no_memory_documents_are_read_anew(runner, apart, caplog):
    apart.full = True
    cache = kept(runner)
    assert "could not be moved" in caplog.text
    assert origins(cache, runner, [*DOCUMENT, 6], 70) == {}
    apart.full = False
    cache.free_devices()
    assert origins(cache, runner, [*DOCUMENT, 7], 70) == {"host": 60}


def test_memory_that_runs_out_is_taken_from_what_is_idle_and_nothing_is_lost(
    runner, apart, monkeypatch
):
    cache = PrefixCache(AMPLE, host_bytes=AMPLE)
    ask(cache, runner, [*OTHER, 5])
    ask(cache, runner, [*DOCUMENT, 5])

    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as context:
        context.setattr("rapid_llm.engine.kv_cache.KVCache.grow", no_memory)
        assert ask(cache, runner, [*DOCUMENT, 6], 90) == 0  # it was lost when it could not grow
    assert cache.nbytes == 90 * BYTES_PER_TOKEN
    assert origins(cache, runner, [*OTHER, 6]) == {"host": 60}


@pytest.mark.usefixtures("apart")
def test_a_model_that_has_changed_gets_nothing_from_the_host(runner):
    cache = kept(runner)
    weight = runner.model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(1.5)
    assert ask(cache, runner, [*DOCUMENT, 6], 70) == 0
    assert ask(cache, make_forward(seed=7), [*DOCUMENT, 6], 70) == 0


@pytest.mark.usefixtures("apart")
def test_what_is_cleared_is_gone_from_the_host_too(runner):
    cache = kept(runner)
    cache.clear()
    assert (cache.nbytes, cache.host_nbytes) == (0, 0)
    assert ask(cache, runner, [*DOCUMENT, 6], 70) == 0
    cache = kept(runner)
    other = make_forward(seed=7)
    cache.forget(other)
    assert cache.host_nbytes > 0
    cache.forget(runner)
    assert (cache.nbytes, cache.host_nbytes) == (0, 0)


@pytest.mark.usefixtures("apart")
def test_only_one_prompt_is_kept_wherever_it_is(runner):
    cache = kept(runner)
    held = cache.host_nbytes
    assert cache.keep_only(runner, [*DOCUMENT, 5]) == 60
    assert (cache.nbytes, cache.host_nbytes) == (0, held)
    assert origins(cache, runner, [*DOCUMENT, 5], 70) == {"host": 60}
    assert cache.keep_only(runner, [*DOCUMENT, 5]) == 60
    assert (cache.nbytes, cache.host_nbytes) == (ONE, 0)
    assert origins(cache, runner, [*DOCUMENT, 5], 70) == {"device": 60}


@pytest.mark.usefixtures("apart")
def test_threads_over_small_tiers_get_the_logits_that_they_get_alone(runner):
    system = text(20, seed=20)
    documents = [[*system, *text(20 + 15 * i, seed=i)] for i in range(4)]
    expected = {
        (i, question): fresh(runner, [*document, 5 + question])
        for i, document in enumerate(documents)
        for question in range(3)
    }
    cache = PrefixCache(90 * BYTES_PER_TOKEN, host_bytes=3 * 90 * BYTES_PER_TOKEN)
    errors: list[BaseException] = []
    reused: set[str] = set()

    def work(seed: int) -> None:
        generator = random.Random(seed)
        try:
            for _ in range(40):
                i, question = generator.randrange(4), generator.randrange(3)
                prompt = [*documents[i], 5 + question]
                with cache.lease(runner, prompt, 90) as lease:
                    reused.update(tier for tier, n in lease.origins.items() if n)
                    if generator.random() < 0.3:
                        continue
                    assert torch.equal(read(runner, prompt, lease), expected[i, question])
                    say(runner, lease, [seed + 3])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert reused == {"device", "host"}
    assert cache.nbytes <= 90 * BYTES_PER_TOKEN
    assert cache.host_nbytes <= 3 * 90 * BYTES_PER_TOKEN


def test_a_decoder_says_which_tier_its_tokens_came_from(apart, tmp_path):
    one = SamplingParams(max_new_tokens=1)

    def decoder(**options) -> RapidDecoder:
        return RapidDecoder(tiny_model(), tiny_tokenizer(), **options)

    def counts(decoder: RapidDecoder, prompt: list[int]) -> tuple[int, int, int, int]:
        stats = decoder.generate(prompt, sampling=one).stats
        assert stats.as_dict()["cached_tokens_device"] == stats.cached_tokens_device
        return (
            stats.cached_tokens,
            stats.cached_tokens_device,
            stats.cached_tokens_host,
            stats.cached_tokens_disk,
        )

    own = decoder(kv_cache_host_bytes=AMPLE)
    assert counts(own, [*DOCUMENT, 5]) == (0, 0, 0, 0)
    assert counts(own, [*DOCUMENT, 6]) == (60, 60, 0, 0)
    assert (own.memory.kept_kv > 0, own.memory.kept_kv_host) == (True, 0)
    own._prefixes.free_devices()
    assert (own.memory.kept_kv, own.memory.kept_kv_host > 0) == (0, True)
    assert counts(own, [*DOCUMENT, 7]) == (60, 0, 60, 0)
    own.clear_cache()
    assert own.memory.kept_kv_host == 0
    # Without a budget for the device the host's default is none either.
    none = decoder(kv_cache_bytes=0)
    assert [counts(none, DOCUMENT)[0] for _ in range(2)] == [0, 0]
    assert none.memory.kept_kv_host == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rapid_llm.engine.prefix_cache.prefixes.WORTH_SAVING", 20)
        patch.setattr("rapid_llm.engine.prefix_cache.prefixes.WORTH_LOADING", 10)
        assert counts(decoder(kv_cache_dir=tmp_path), [*DOCUMENT, 5])[0] == 0
        later = decoder(kv_cache_dir=tmp_path)
        assert counts(later, [*DOCUMENT, 6]) == (60, 0, 0, 60)
        assert later.memory.kept_kv_disk == sum(
            path.stat().st_size for path in tmp_path.glob("*.safetensors")
        )


def test_a_cpus_memory_is_the_hosts(runner):
    cache = PrefixCache(ONE, host_bytes=AMPLE)
    for document in (DOCUMENT, OTHER):
        ask(cache, runner, [*document, 5], 70)
    assert cache.host_nbytes == 0
    assert ask(cache, runner, [*DOCUMENT, 5], 70) == 0
