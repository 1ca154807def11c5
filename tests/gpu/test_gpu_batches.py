"""Several sequences in one pass on a GPU: the logits and tokens of each alone, captured and not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import tiny_tokenizer
from gpu_models import (
    CAPTURED,
    DEVICE,
    GRAPHS,
    HEADS,
    assert_as_good,
    cuda_only,
    exact_products,
    model_on_device,
    on_gpu,
    with_heads,
)

from rapid_llm.batching import GenerationRequest
from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.parts import Part
from rapid_llm.engine.session import Session

pytestmark = on_gpu

DOCUMENT = 700
IDS = torch.randint(3, 64, (1200,), generator=torch.Generator().manual_seed(1))
FAMILY = ("llama", "qwen2", "qwen2-sliding", "qwen3", "mistral", "mistral-sliding")


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with exact_products():
        yield


def sequences(runner: ModelRunner) -> list[tuple[KVCache, torch.Tensor]]:
    """Caches of a document, of three that begin with it or a part, and of another; their tokens."""
    texts = [IDS[:DOCUMENT]]
    caches = [runner.new_cache(1024)]
    Session(runner, caches[0]).prefill(texts[0].tolist())
    for lender, length, tail in ((0, DOCUMENT, 9), (0, 431, 70), (2, 490, 0)):
        caches.append(caches[lender].borrow(length, 1024))
        own = IDS[DOCUMENT + 40 :][:tail]
        if tail:
            Session(runner, caches[-1]).extend(own.to(DEVICE))
        texts.append(torch.cat([texts[lender][:length], own]))
    texts.append(IDS[900:1000])
    caches.append(runner.new_cache(256))
    Session(runner, caches[-1]).prefill(texts[-1].tolist())
    return list(zip(caches, texts, strict=True))


@torch.inference_mode()
def check(runner: ModelRunner) -> None:
    held = sequences(runner)
    for sizes in ((1, 1, 1, 1, 1), (3, 1, 5, 2, 4), (17, 1, 16, 2, 9), (30, 30, 20, 9, 31)):
        new = [IDS[1100 - size : 1100] for size in sizes]
        parts = [
            Part(own.to(DEVICE), cache, len(own)) for own, (cache, _) in zip(new, held, strict=True)
        ]
        for logits, own, (cache, text) in zip(runner.joined(parts), new, held, strict=True):
            whole = torch.cat([text, own])
            assert cache.length == len(whole)
            assert_as_good(logits, runner.model, whole, slice(-len(own), None))
            cache.rollback(len(text))


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("architecture", FAMILY)
def test_sequences_get_the_logits_of_each_alone(architecture: str, graphs: bool) -> None:
    model = model_on_device(architecture, max_position_embeddings=2048)
    check(ModelRunner(model, architecture, cuda_graphs=graphs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("heads", HEADS)
def test_heads_of_every_size_and_group_are_right_in_16_bits(heads: str, dtype: torch.dtype) -> None:
    check(ModelRunner(with_heads(heads, dtype), heads, cuda_graphs=CAPTURED))


@pytest.mark.parametrize("graphs", GRAPHS)
def test_requests_at_once_get_the_tokens_of_each_alone(graphs: bool) -> None:
    model = model_on_device(max_position_embeddings=2048)
    decoder = RapidDecoder(model, tiny_tokenizer(), cuda_graphs=graphs)
    document = IDS[:DOCUMENT].tolist()
    requests = [
        GenerationRequest(
            [*document, 5 + i, 9],
            [*document[:100], 5 + i] if i % 3 else None,
            sampling=SamplingParams(
                max_new_tokens=24, seed=i, temperature=float(i % 2), ignore_eos=True
            ),
            speculation=SpeculationConfig(gamma=1 + i % 4, lookup=False),
        )
        for i in range(8)
    ]
    expected = [decoder.generate(*each.prompts, **each.options).token_ids for each in requests]
    assert [each.token_ids for each in decoder.generate_many(requests)] == expected


@cuda_only
@torch.inference_mode()
def test_a_joined_pass_that_is_captured_does_not_wait_for_the_device() -> None:
    runner = ModelRunner(with_heads("128, group 8", torch.bfloat16), "captured", cuda_graphs=True)
    held = sequences(runner)
    parts = [Part(torch.full((2,), 7, device=DEVICE), cache, 1) for cache, _ in held]
    runner.joined(parts)  # captures
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner.joined(parts)
    finally:
        torch.cuda.set_sync_debug_mode(before)
