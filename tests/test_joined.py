"""Passes over several sequences: the logits of each alone, and nothing is read twice."""

from __future__ import annotations

from random import Random

import pytest
import torch
from conftest import installed, tiny_model

from rapid_llm.engine import sdpa
from rapid_llm.engine.device import Device, device_of
from rapid_llm.engine.joined import reads_of, sharing_order
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.parts import Part
from rapid_llm.engine.session import Extend, Session, extend_all
from rapid_llm.errors import OutdatedKVError

LEAN = ["llama", "qwen2", "qwen2-sliding", "qwen3", "mistral", "mistral-sliding"]
DOCUMENT = [5, 9, 31, 7, 44, 12, 8, 30, 21, 17, 60, 3, 11, 40, 6]
TAILS = [[4, 19], [50], [33, 2, 8, 14, 27, 9], []]
NEW = [[7], [8, 9, 10], [21, 5], [40, 41, 42, 43]]


def runner_of(architecture: str) -> ModelRunner:
    return ModelRunner(tiny_model(architecture), architecture)


def read(runner: ModelRunner, tokens: list[int]) -> KVCache:
    cache = runner.new_cache(40)
    Session(runner, cache).extend(torch.tensor(tokens))
    return cache


def alone(runner: ModelRunner, tokens: list[int], new: list[int]) -> torch.Tensor:
    return Session(runner, read(runner, tokens)).extend(torch.tensor(new))


def borrowers(runner: ModelRunner, document: KVCache) -> list[KVCache]:
    """A cache for each tail, of which the third borrows from the first as well."""
    caches = []
    for number, tail in enumerate(TAILS):
        cache = document.borrow(len(DOCUMENT) - (number == 1), 40)
        if number == 1:
            Session(runner, cache).extend(torch.tensor(DOCUMENT[-1:]))
        if tail:
            Session(runner, cache).extend(torch.tensor(tail))
        caches.append(cache)
    return caches


@pytest.mark.parametrize("architecture", LEAN)
def test_sequences_on_one_document_get_the_logits_of_each_alone(architecture):
    runner = runner_of(architecture)
    document = read(runner, DOCUMENT)
    caches = [document, *borrowers(runner, document), read(runner, [3, 4])]
    caches.append(caches[3].borrow(len(DOCUMENT) + 4, 40))  # what it borrows and its own
    before = [DOCUMENT, *(DOCUMENT + tail for tail in TAILS), [3, 4], DOCUMENT + TAILS[2][:4]]
    new = [[13, 14], *NEW, [5, 6, 7], [22]]
    for keep in (1, None):
        parts = [
            Part(torch.tensor(ids), cache, keep or len(ids))
            for ids, cache in zip(new, caches, strict=True)
        ]
        for logits, held, ids in zip(runner.joined(parts), before, new, strict=True):
            expected = alone(runner, held, ids)[-(keep or len(ids)) :]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        for cache, held in zip(caches, before, strict=True):
            cache.rollback(len(held))


def test_each_key_is_read_once_for_all_that_have_it():
    runner = runner_of("llama")
    document = read(runner, DOCUMENT)
    caches = [document, *borrowers(runner, document)]
    parts = [Part(torch.tensor([7, 8]), cache, 1) for cache in caches]
    order = sharing_order(parts)
    assert order == [2, 1, 3, 4, 0]  # the one that borrows least, and the owner at the end
    reads = [r for r in reads_of([parts[i] for i in order]) if r.cache is document]
    n = len(DOCUMENT)
    assert [(r.start, r.end, r.new) for r in reads] == [(0, n - 1, 0), (n - 1, n, 0), (n, n + 2, 2)]
    assert [r.tokens for r in reads] == [slice(0, 10), slice(2, 10), slice(8, 10)]


def test_readers_of_a_stretch_stand_together_in_any_family_of_sequences():
    model = runner_of("llama")
    random = Random(0)
    for _ in range(200):
        caches = [read(model, DOCUMENT) for _ in range(2)]
        for _ in range(random.randint(1, 10)):
            lender = random.choice(caches)
            caches.append(lender.borrow(random.randint(1, lender.length), 40))
            if random.random() < 0.8:  # else without tokens of its own
                caches[-1].allocate()
                caches[-1].advance(random.randint(1, 3))
        random.shuffle(caches)
        parts = [Part(torch.arange(random.randint(1, 3)), each, 1) for each in caches]
        reads = reads_of([parts[index] for index in sharing_order(parts)])  # or it raises
        assert sum(
            (r.end - r.start - r.new) * (r.tokens.stop - r.tokens.start) for r in reads
        ) + sum(r.new * r.new for r in reads) == sum(
            (part.cache.length + len(part.ids)) * len(part.ids) for part in parts
        )


def test_a_borrowed_prefix_is_not_copied_and_takes_no_memory():
    runner = runner_of("llama")
    document = read(runner, DOCUMENT)
    cache = document.borrow(len(DOCUMENT), 25)
    Session(runner, cache).extend(torch.tensor([7]))
    assert cache.nbytes == document.nbytes * 10 // 40
    assert (cache.length, document.lent) == (16, 15)
    del cache
    assert document.lent == 0


def test_a_borrower_of_an_outdated_prefix_reads_it_anew():
    runner = runner_of("llama")
    document = read(runner, DOCUMENT)
    cache = document.borrow(len(DOCUMENT), 40)
    session = Session(runner, cache, DOCUMENT)
    with torch.no_grad():
        runner.model.lm_head.weight.mul_(2)
        runner.model.model.layers[0].self_attn.k_proj.weight.mul_(2)
    with pytest.raises(OutdatedKVError):
        runner.joined([Part(torch.tensor([7]), cache, 1)])
    torch.testing.assert_close(session.extend(torch.tensor([7])), alone(runner, DOCUMENT, [7]))
    assert (cache.prefix, document.length) == ((), len(DOCUMENT))


def test_a_pass_that_fails_changes_no_cache(monkeypatch):
    runner = runner_of("llama")
    caches = [read(runner, DOCUMENT), read(runner, [3, 4])]
    parts = [Part(torch.tensor([7, 8]), cache, 1) for cache in caches]

    def fail(*_):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("rapid_llm.engine.joined.Merged.add", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            runner.joined(parts)
    assert [cache.length for cache in caches] == [len(DOCUMENT), 2]
    torch.testing.assert_close(runner.joined(parts)[1], alone(runner, [3, 4], [7, 8])[-1:])


@pytest.mark.parametrize("kind", ["cpu", "triton"])
@pytest.mark.parametrize(("keys", "tokens", "masked"), [(40, 3, 0), (40, 5, 5), (1500, 20, 0)])
def test_kernels_for_parts_agree(kind, keys, tokens, masked):
    if kind == "cpu":
        from rapid_llm.engine.cpu.attention import attend_part
    else:
        installed("triton")
        from rapid_llm.engine.cuda.attention import attend_part
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, n, 16) for n in (3 * tokens, keys + 9, keys + 9))
    mask = torch.ones(tokens, tokens, dtype=torch.bool).triu(1) if masked else None
    arguments = query, key[:, 4:-5], value[:, 4:-5], 0.3, mask, mask is not None
    ours, expected = attend_part(*arguments), sdpa.attend_part(*arguments)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    # Heads of one token stand together where each has a KV head of its own.
    apart = query.transpose(0, 1).contiguous().transpose(0, 1), *arguments[1:]
    torch.testing.assert_close(attend_part(*apart), expected, rtol=1e-4, atol=1e-4)


def test_an_owner_that_goes_back_leaves_what_is_borrowed_alone():
    """A recomputation after a switch of adapters, and back, must not change what others read."""
    runner = runner_of("llama")
    document = read(runner, DOCUMENT)
    cache = document.borrow(len(DOCUMENT), 40)
    Session(runner, cache).extend(torch.tensor([4, 19]))
    third = cache.borrow(len(DOCUMENT) + 2, 40)
    for owner in (document, cache):
        owner.rollback(0)
        Session(runner, owner).extend(torch.tensor([60 - token for token in DOCUMENT]))
        logits = runner.joined([Part(torch.tensor([7]), third, 1)])[0]
        torch.testing.assert_close(logits, alone(runner, [*DOCUMENT, 4, 19], [7]))
        third.rollback(len(DOCUMENT) + 2)
    assert (document.lent, cache.lent) == (0, 0)


def test_an_owner_that_goes_back_keeps_its_first_tokens():
    runner = runner_of("llama")
    document = read(runner, DOCUMENT)
    cache = document.borrow(10, 40)
    document.rollback(6)
    logits = Session(runner, document).extend(torch.tensor([8, 9]))
    torch.testing.assert_close(logits, alone(runner, DOCUMENT[:6], [8, 9]))
    found = runner.joined([Part(torch.tensor([7]), cache, 1)])[0]
    torch.testing.assert_close(found, alone(runner, DOCUMENT[:10], [7]))


def test_what_an_owner_in_another_thread_does_changes_no_reads():
    """Its length counts for its own passes only."""
    runner = runner_of("llama")
    document = read(runner, DOCUMENT)
    parts = [Part(torch.tensor([7, 8]), document.borrow(len(DOCUMENT), 40), 1)]
    for layer in document.layers:
        layer.length = 0
    assert [read.new for read in reads_of(parts)] == [0, 2]


def test_a_sliding_window_within_the_new_tokens_is_not_told_to_be_causal(monkeypatch):
    """Kernels may apply the causal rule instead of the mask where they are told so."""
    runner = runner_of("mistral-sliding")
    window = runner.config.sliding_window
    document = read(runner, DOCUMENT)
    masks: list[tuple[torch.Tensor, bool]] = []

    def spy(query, key, value, scaling, mask, causal):
        if mask is not None:
            masks.append((mask, causal))
        return sdpa.attend_part(query, key, value, scaling, mask, causal)

    place = device_of(torch.device("cpu"))
    monkeypatch.setattr(type(place), "attend_part", lambda *_: spy)
    new = list(range(3, 3 + 2 * window))
    caches = [document.borrow(len(DOCUMENT), 20 + 2 * window) for _ in range(2)]
    parts = [Part(torch.tensor(new), caches[0], 1), Part(torch.tensor(new[:2]), caches[1], 1)]
    logits = runner.joined(parts)[0]
    whole = runner.new_cache(20 + 2 * window)
    expected = Session(runner, whole).extend(torch.tensor([*DOCUMENT, *new]), 1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert {causal for _, causal in masks} == {True, False}
    for mask, causal in masks:
        ones = torch.ones(mask.shape, dtype=torch.bool)
        assert not causal or torch.equal(mask, ones.triu(mask.shape[1] - mask.shape[0] + 1))


def test_many_keys_alike_do_not_overflow_float16():
    keys = 100_000
    query, key = torch.zeros(1, 2, 8).half(), torch.zeros(1, keys, 8).half()
    value = torch.full((1, keys, 8), 3.0).half()
    out, lse = sdpa.attend_part(query, key, value, 1.0, None, causal=False)
    torch.testing.assert_close(out, torch.full((1, 2, 8), 3.0), rtol=2e-2, atol=0)
    torch.testing.assert_close(lse, torch.full((1, 2), float(keys)).log())


def test_kv_that_could_not_be_computed_again_is_computed_later(monkeypatch):
    """Memory runs out within it: the tokens after it must not take the place of the lost ones."""
    runner = runner_of("llama")
    session = Session(runner, runner.new_cache(40), DOCUMENT)
    monkeypatch.setattr(Device, "prefill_chunk", 4)
    session.prefill(DOCUMENT[:9])
    session.extend(torch.tensor(DOCUMENT[9:]))
    with torch.no_grad():
        runner.model.model.layers[0].self_attn.k_proj.weight.mul_(2)
    run = ModelRunner.__call__

    def fail(self: ModelRunner, tokens: torch.Tensor, cache: KVCache, keep: int) -> torch.Tensor:
        if cache.length == 4:
            raise torch.OutOfMemoryError
        return run(self, tokens, cache, keep)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "__call__", fail)
        with pytest.raises(torch.OutOfMemoryError):
            session.extend(torch.tensor([7]))
    assert session.length == len(DOCUMENT)
    session.rollback(len(DOCUMENT) - 1)
    assert session.draft(torch.tensor([7]), 1, None, None) is None
    (logits,) = extend_all([Extend(session, torch.tensor([7]))])
    torch.testing.assert_close(logits, alone(runner, DOCUMENT[:-1], [7]))
    assert session.length == session.cache.length == len(DOCUMENT)
