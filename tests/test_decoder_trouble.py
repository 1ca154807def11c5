"""After a closed stream, an interrupt, a timeout or NaN the decoder answers the next call."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from decoding import DRAFT_PROMPT, GREEDY, SAMPLED, TARGET_PROMPT, CountedForward

from rapid_llm.config import SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.kv_cache import PreallocatedLayer
from rapid_llm.errors import GenerationTimeoutError, NumericalError


@pytest.fixture
def expected(decoder) -> list[int]:
    return decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY).token_ids


def test_a_closed_stream_leaves_nothing_behind(decoder, expected, monkeypatch):
    counted = CountedForward(monkeypatch)
    stream = decoder.stream(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY)
    next(stream)
    assert not torch.is_inference_mode_enabled()  # the caller's own tensors stay trainable
    stream.close()
    passes = len(counted.passes)
    with pytest.raises(StopIteration):
        next(stream)
    assert len(counted.passes) == passes
    assert decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY).token_ids == expected


@pytest.mark.parametrize("at", [1, 3, 12])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_interrupt_leaves_nothing_behind(decoder, expected, monkeypatch, at, error):
    original, calls = PreallocatedLayer.update, iter(range(1000))

    def interrupted(*args, **kwargs):
        if next(calls) == at:
            raise error
        return original(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(PreallocatedLayer, "update", interrupted)
        with pytest.raises(error):
            decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY)
    assert decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY).token_ids == expected


def test_a_timeout_while_reading_the_prompt_leaves_the_decoder_usable(decoder, expected):
    hurried = replace(GREEDY, timeout=1e-9)
    with pytest.raises(GenerationTimeoutError, match=r"timeout=1e-09 s passed after 0 of .* 40 "):
        decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=hurried)
    assert decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY).token_ids == expected


def test_a_timeout_ends_a_stream_after_the_round_and_not_a_finished_answer(
    decoder, expected, monkeypatch
):
    clock, late = time.perf_counter, []
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 700 * len(late))
    sampling = replace(GREEDY, timeout=600)
    stream = decoder.stream(TARGET_PROMPT, sampling=sampling)
    next(stream)
    late.append(True)
    with pytest.raises(GenerationTimeoutError, match="after 2 of at most 40 tokens"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    late.clear()
    stream = decoder.stream(TARGET_PROMPT, sampling=replace(sampling, max_new_tokens=2))
    next(stream)
    late.append(True)
    assert next(stream).finish_reason == "length"
    assert decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY).token_ids == expected


def test_streams_may_interleave(decoder, expected):
    streams = [decoder.stream(TARGET_PROMPT, DRAFT_PROMPT, sampling=GREEDY) for _ in range(3)]
    outputs: list[list[int]] = [[], [], []]
    for chunks in zip(*streams, strict=True):
        for output, chunk in zip(outputs, chunks, strict=True):
            output += chunk.token_ids
    assert outputs == [expected] * 3


def test_threads_get_the_answers_that_they_get_alone(decoder):
    prompts = [[seed + 3, *TARGET_PROMPT] for seed in range(6)]

    def answer(prompt):
        return decoder.generate(prompt, DRAFT_PROMPT, sampling=SAMPLED).token_ids

    alone = [answer(prompt) for prompt in prompts]
    together: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda i=i, p=p: together.update({i: answer(p)}))
        for i, p in enumerate(prompts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(6)] == alone


@pytest.mark.parametrize("broken", ["target", "drafter"])
def test_nan_names_the_model(broken):
    models = {"target": tiny_model(), "drafter": tiny_model(seed=1)}
    with torch.no_grad():
        models[broken].lm_head.weight[7] = float("nan")
    decoder = RapidDecoder(
        models["target"], tiny_tokenizer(), models["drafter"], name="the-target",
        drafter_name="the-drafter",
    )  # fmt: skip
    drafts = SpeculationConfig(gamma=4)  # whether or not they pay
    for sampling in (GREEDY, SAMPLED):
        with pytest.raises(NumericalError, match=f"the-{broken} produced NaN.*dtype"):
            decoder.generate(TARGET_PROMPT, DRAFT_PROMPT, sampling=sampling, speculation=drafts)
