"""Kept KV that leaves a GPU for pinned host memory and comes back: equal, beside other work."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import tiny_tokenizer
from gpu_models import DEVICE, PASSES, cuda_only, exact_products, model_on_device, on_gpu

from rapid_llm.config import SamplingParams
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.device import device_of
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache.prefixes import PrefixCache
from rapid_llm.engine.session import Session

pytestmark = [*on_gpu, cuda_only]

ANSWER = SamplingParams(max_new_tokens=16, ignore_eos=True)


def document(seed: int, tokens: int = 2500) -> list[int]:
    return random.Random(seed).choices(range(3, 64), k=tokens)


@torch.inference_mode()
def logits(runner: ModelRunner, prompt: list[int], cache: PrefixCache) -> tuple[torch.Tensor, dict]:
    """Logits after the last token, and the tokens reused by tier."""
    with cache.lease(runner, prompt, runner.capacity_for(len(prompt))) as lease:
        session = Session(runner, lease.cache, prompt)
        session.prefill(prompt[:-1])
        last = session.extend(runner.tensor(prompt[-1:]))[0]
        return last.cpu(), {tier: n for tier, n in lease.origins.items() if n}


@pytest.mark.parametrize(("architecture", "graphs"), PASSES)
def test_what_was_pushed_out_to_the_host_comes_back_as_it_was(architecture, graphs):
    with exact_products():
        model = model_on_device(architecture, max_position_embeddings=8192)
        runner = ModelRunner(model, "tiny", cuda_graphs=graphs)
        prompt = [*document(0), 5, 6]
        cache = PrefixCache(1 << 30, host_bytes=1 << 30)
        expected, reused = logits(runner, prompt, cache)
        assert reused == {}
        cache.free_devices()
        assert cache.nbytes == 0
        torch.empty(1 << 26, device=DEVICE).random_()  # over the memory that is free now
        again, reused = logits(runner, prompt, cache)
        assert reused == {"host": len(prompt) - 1}
        assert torch.equal(again, expected)


def test_a_decoder_answers_from_the_host_as_if_nothing_was_read_before():
    model = model_on_device("llama", max_position_embeddings=8192, eos_token_id=None)
    fresh = RapidDecoder(model, tiny_tokenizer(), kv_cache_bytes=0)
    kept = RapidDecoder(model, tiny_tokenizer())
    kept.generate([*document(0), 5], sampling=ANSWER)
    for question in ([6, 7], [8, 9, 10]):
        kept._prefixes.free_devices()
        assert kept.memory.kept_kv == 0
        assert kept.memory.kept_kv_host > 0
        result = kept.generate([*document(0), *question], sampling=ANSWER)
        assert result.stats.cached_tokens_host >= 2048
        expected = fresh.generate([*document(0), *question], sampling=ANSWER)
        assert result.token_ids == expected.token_ids
        assert expected.stats.cached_tokens == 0


def test_copies_are_made_beside_what_the_device_does():
    device = device_of(DEVICE)
    source = torch.arange(1 << 20, device=DEVICE).view(torch.uint8)
    buffer = device.host_buffer(source.nbytes)
    assert buffer.is_pinned()
    back = torch.zeros_like(source)
    torch.cuda.synchronize()
    before = device.queued(DEVICE)
    torch.cuda._sleep(4_000_000_000)  # seconds
    busy = torch.cuda.Event()
    busy.record()
    device.transfer([(source, buffer)], DEVICE, before)
    device.transfer([(buffer, back)], DEVICE, before)
    assert not busy.query()
    torch.cuda.synchronize()
    assert torch.equal(back, source)


def test_copies_wait_for_what_was_queued_before_them():
    device = device_of(DEVICE)
    source = torch.zeros(1 << 20, dtype=torch.uint8, device=DEVICE)
    buffer = device.host_buffer(source.nbytes)
    torch.cuda._sleep(400_000_000)
    source.fill_(7)
    device.transfer([(source, buffer)], DEVICE, device.queued(DEVICE))
    assert (buffer == 7).all()
