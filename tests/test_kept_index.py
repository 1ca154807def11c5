"""Kept prefixes are found without a look at each: the same steps beside few and beside many."""

from __future__ import annotations

import random
import sys
from collections import Counter
from types import FrameType
from typing import Any

import numpy as np
import pytest
from kept_prompts import AMPLE, CHUNK, make_forward, read, text

from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache.chain import PassChain
from rapid_llm.engine.prefix_cache.index import PrefixIndex
from rapid_llm.engine.prefix_cache.prefixes import PrefixCache

SIZES = (8, 4)


def chain(tokens: list[int]) -> PassChain:
    return PassChain.of(np.array(tokens, dtype=np.int32), SIZES)


def test_the_longest_shared_prefix_is_found_as_by_comparing_all():
    draws = random.Random(0)
    index: PrefixIndex[int] = PrefixIndex()
    prompts: dict[int, tuple[str, list[int]]] = {}
    for step in range(600):
        state = draws.choice("ab")
        tokens = [draws.randrange(2) for _ in range(draws.randrange(1, 40))]
        if step % 3 and prompts:  # begins like another
            _, other = draws.choice(list(prompts.values()))
            tokens = other[: draws.randrange(len(other) + 1)] + tokens
        found, shared = index.longest(state, chain(tokens))
        lengths = {
            item: chain(theirs).common(chain(tokens))
            for item, (where, theirs) in prompts.items()
            if where == state
        }
        most = max(lengths.values(), default=0)
        assert shared == most
        latest = [item for item, length in lengths.items() if length == most > 0]
        assert found == (latest[-1] if latest else None)
        mostly = {i for i, n in lengths.items() if 2 * n >= len(prompts[i][1])}
        assert set(index.mostly_in(state, chain(tokens))) == mostly
        prompts[step] = state, tokens
        index.add(step, state, chain(tokens))
        if draws.random() < 0.4:
            gone = draws.choice(list(prompts))
            del prompts[gone]
            index.discard(gone)
            assert gone not in index
    for item in list(prompts):
        index.discard(item)
    assert not index._items
    assert not index._passes
    assert not index._middles


def calls(run: Any) -> Counter[str]:
    """Python functions that are called, by name."""
    counted: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and "rapid_llm" in frame.f_code.co_filename:
            counted[frame.f_code.co_qualname if sys.version_info >= (3, 11) else ""] += 1

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return counted


@pytest.mark.parametrize("system", [0, 40], ids=["apart", "behind one system prompt"])
def test_a_lease_beside_many_documents_takes_the_steps_of_one_beside_few(monkeypatch, system):
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", CHUNK)
    runner: ModelRunner = make_forward()
    head = text(system, seed=99)

    def steps(documents: int) -> Counter[str]:
        cache = PrefixCache(AMPLE)
        for seed in range(documents):
            prompt = [*head, *text(60, seed=seed)]
            with cache.lease(runner, prompt, len(prompt)) as lease:
                read(runner, prompt, lease)
        asked = [*head, *text(60, seed=1), 5]

        def lease() -> None:
            with cache.lease(runner, asked, len(asked)) as lease:
                assert lease.reused == system + 50

        return calls(lease)

    assert steps(200) == steps(4)
