"""Captured passes over several sequences: the same code, uncaptured, in Triton's interpreter."""

from __future__ import annotations

from random import Random

import pytest
import torch
from conftest import ARCHITECTURES, installed, tiny_model, tiny_tokenizer

from rapid_llm.batching import GenerationRequest, Scheduler
from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.parts import Part
from rapid_llm.engine.session import Session
from rapid_llm.errors import OutdatedKVError

installed("triton")

from rapid_llm.engine.cuda import batch, joined
from rapid_llm.engine.cuda.attention_config import Config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has these")

FAMILY = [name for name in ARCHITECTURES if ModelRunner(tiny_model(name), name).joins]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TEXT = torch.randint(3, 64, (90,), generator=torch.Generator().manual_seed(1)).tolist()
NEW = [[7], [8, 9, 10], [21, 5], [40, 41, 42, 43], [13]]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """As the interpreter runs those too that have nothing to do."""
    monkeypatch.setattr(batch, "MOST_CACHES", 12)
    config = Config(splits=3, block=16, warps=4, stages=2)
    monkeypatch.setattr(joined, "config_of", lambda *_: config)


def sequences(runner: ModelRunner) -> tuple[list[KVCache], list[list[int]]]:
    """Five sequences, most of which begin with what another has, and their tokens."""
    caches, texts = [runner.new_cache(150)], [TEXT[:50]]
    Session(runner, caches[0]).extend(torch.tensor(texts[0]))
    for lender, length, tail in ((0, 50, 3), (0, 37, 20), (2, 47, 0)):
        caches.append(caches[lender].borrow(length, 150))
        texts.append(texts[lender][:length] + TEXT[60 : 60 + tail])
        if tail:
            Session(runner, caches[-1]).extend(torch.tensor(texts[-1][length:]))
    caches.append(runner.new_cache(20))
    texts.append([5, 7, 9])
    Session(runner, caches[-1]).extend(torch.tensor(texts[-1]))
    for cache in caches:
        for layer in cache.layers:
            if layer.is_initialized:  # what no pass may read
                layer.keys[:, :, layer.length :] = torch.nan
                layer.values[:, :, layer.length :] = torch.nan
    return caches, texts


def buckets(runner: ModelRunner) -> set[int]:
    """Numbers of tokens of the graphs of joined passes."""
    return {bucket for bucket, _ in runner.passes[0]._joined._graphs._captured}


def alone(runner: ModelRunner, text: list[int], new: list[int]) -> torch.Tensor:
    session = Session(runner, runner.new_cache(150))
    session.extend(torch.tensor(text))
    return session.extend(torch.tensor(new))


@pytest.mark.parametrize("architecture", FAMILY)
@torch.inference_mode()
def test_sequences_that_share_their_beginnings_get_the_logits_of_each_alone(live, architecture):
    model = tiny_model(architecture)
    plain, ours = ModelRunner(model, "plain", cuda_graphs=False), ModelRunner(model, "captured")
    caches, texts = sequences(ours)
    expected = [alone(plain, text, new) for text, new in zip(texts, NEW, strict=True)]
    live.launched = 0
    for keep in (1, None):
        parts = [
            Part(torch.tensor(new), cache, keep or len(new))
            for new, cache in zip(NEW, caches, strict=True)
        ]
        for logits, exact in zip(ours.joined(parts), expected, strict=True):
            torch.testing.assert_close(logits, exact[-(keep or len(exact)) :], **CLOSE)
        for cache, text in zip(caches, texts, strict=True):
            cache.rollback(len(text))
    assert live.launched == 2


@torch.inference_mode()
def test_a_graph_is_captured_for_each_bucket_and_serves_any_sequences(live):
    ours = ModelRunner(tiny_model(), "captured")
    plain = ModelRunner(tiny_model(), "plain", cuda_graphs=False)
    caches, texts = sequences(ours)
    live.launched = 0
    for chosen, tokens in (([0, 1], 1), ([4, 3, 1], 4), ([0, 2], 8), ([2, 3], 10), ([1], 2)):
        new = TEXT[:tokens]
        parts = [Part(torch.tensor(new), caches[index], 1) for index in chosen]
        for index, logits in zip(chosen, ours.joined(parts), strict=True):
            exact = alone(plain, texts[index], new)[-1:]
            torch.testing.assert_close(logits, exact, **CLOSE)
            caches[index].rollback(len(texts[index]))
    assert live.launched == 5
    assert buckets(ours) == {16, 32}


@torch.inference_mode()
def test_what_a_graph_does_not_serve_is_run_kernel_by_kernel(live, monkeypatch):
    ours = ModelRunner(tiny_model(), "captured")
    plain = ModelRunner(tiny_model(), "plain", cuda_graphs=False)
    caches, texts = sequences(ours)
    live.launched = 0
    new = TEXT[: joined.BUCKETS[-1] // 2 + 1]
    one, other = ours.joined([Part(torch.tensor(new), cache, 1) for cache in caches[2:4]])
    torch.testing.assert_close(one, alone(plain, texts[2], new)[-1:], **CLOSE)
    torch.testing.assert_close(other, alone(plain, texts[3], new)[-1:], **CLOSE)
    monkeypatch.setattr(batch, "MOST_SEQUENCES", 1)
    ours.joined([Part(torch.tensor([5]), cache, 1) for cache in caches[:2]])
    monkeypatch.undo()
    empty = [caches[0], ours.new_cache(20)]
    ours.joined([Part(torch.tensor([5]), cache, 1) for cache in empty])
    assert live.launched == 0


def test_a_graph_has_room_for_the_results_of_the_sequences_that_it_serves(monkeypatch):
    """However long the chain of those that each borrow from the one before."""
    monkeypatch.setattr(batch, "MOST_CACHES", 64)
    model, random = ModelRunner(tiny_model(), "model"), Random(0)
    document = model.new_cache(1000)
    Session(model, document).extend(torch.tensor(TEXT))
    state = batch.BatchState(128, 2, splits=2, block=16, device=torch.device("cpu"))
    served = set()
    for _ in range(20):
        caches = [document]
        for _ in range(45):
            lender = caches[-1]
            caches.append(lender.borrow(random.randint(lender.length - 1, lender.length), 1000))
            caches[-1].allocate()
            caches[-1].advance(2)
        for depth in range(1, 46):
            last = Part(torch.tensor([5]), document, 1)
            parts = [Part(torch.arange(127), caches[depth], 1), last]
            if batch.is_small(parts):
                state.describe(parts)  # or it raises
                served.add(depth)
    assert served == set(range(1, 31))


@torch.no_grad()
def test_a_model_that_changes_between_joined_passes_is_noticed(live):
    ours = ModelRunner(tiny_model(), "captured")
    with torch.inference_mode():
        caches, _ = sequences(ours)
        parts = [Part(torch.tensor([7]), cache, 1) for cache in caches]
        ours.joined(parts)
    ours.model.model.layers[0].self_attn.o_proj.weight.mul_(2)
    held = [cache.length for cache in caches]
    with torch.inference_mode(), pytest.raises(OutdatedKVError):
        ours.joined(parts)
    assert [cache.length for cache in caches] == held


def test_requests_at_once_are_answered_by_graphs_as_each_alone(live):
    document = TEXT[:40]
    requests = [
        GenerationRequest(
            [*document, 5 + i, 9],
            [*document[:12], 5 + i] if i % 2 else None,
            sampling=SamplingParams(max_new_tokens=6, seed=i, ignore_eos=True),
            speculation=SpeculationConfig(gamma=3, lookup=False),
        )
        for i in range(3)
    ]
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    plain = RapidDecoder(tiny_model(), tiny_tokenizer(), cuda_graphs=False)
    expected = [plain.generate(*each.prompts, **each.options).token_ids for each in requests]
    results = Scheduler(decoder).generate_many(requests)
    assert [each.token_ids for each in results] == expected
    assert buckets(decoder.target) == {16}
