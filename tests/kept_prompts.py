"""Prompts read through a prefix cache, and compared with a fresh prefill, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from conftest import tiny_model

from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache.chain import PassChain
from rapid_llm.engine.prefix_cache.prefixes import PrefixCache
from rapid_llm.engine.prefix_cache.reading import Lease
from rapid_llm.engine.session import Session

BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, head size, float32
AMPLE = 1 << 30
CHUNK = 10


def text(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, 64), k=length)


DOCUMENT = text(60, seed=1)
OTHER = text(60, seed=2)
LONG = text(1500, seed=3)


def make_forward(seed: int = 0, **changes) -> ModelRunner:
    return ModelRunner(tiny_model(seed=seed, max_position_embeddings=4096, **changes), "tiny")


def passes_of(runner: ModelRunner, prompt: Sequence[int]) -> PassChain:
    """The passes of a prompt's prefill, but for its last token."""
    return PassChain.of(torch.tensor(prompt[:-1]).int().numpy(), runner.prefill_sizes)


@torch.inference_mode()
def read(
    runner: ModelRunner, prompt: Sequence[int], lease: Lease, until: int | None = None
) -> torch.Tensor:
    """Read what the lease lacks of its prompt; logits ``[vocab]`` after the last token.

    ``until``: be interrupted when so many tokens were read.
    """
    session = Session(runner, lease.cache)
    session.prefill(prompt[:-1] if until is None else prompt[:until])
    return session.extend(torch.tensor(prompt[-1:]))[0] if until is None else torch.empty(0)


@torch.inference_mode()
def say(runner: ModelRunner, lease: Lease, tokens: list[int]) -> None:
    """Decode them, whether they are kept or not."""
    runner(torch.tensor(tokens), lease.cache, keep_logits=1)


def fresh(runner: ModelRunner, prompt: Sequence[int]) -> torch.Tensor:
    return read(runner, prompt, Lease(runner.new_cache(len(prompt)), {}))


def origins(
    cache: PrefixCache, runner: ModelRunner, prompt: list[int], capacity: int | None = None
) -> dict[str, int]:
    """Read a prompt through the cache, compare with a fresh prefill; tokens reused by tier."""
    with cache.lease(runner, prompt, capacity or len(prompt)) as lease:
        assert lease.cache.capacity >= (capacity or len(prompt))
        assert lease.cache.length == lease.reused
        assert torch.equal(read(runner, prompt, lease), fresh(runner, prompt))
        return {tier: tokens for tier, tokens in lease.origins.items() if tokens}


def ask(
    cache: PrefixCache, runner: ModelRunner, prompt: list[int], capacity: int | None = None
) -> int:
    """Read a prompt through the cache, compare with a fresh prefill; tokens that were reused."""
    return sum(origins(cache, runner, prompt, capacity).values())
