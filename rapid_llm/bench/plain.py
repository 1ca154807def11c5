"""Plain decoding beside transformers' ``generate``: the same weights, prompt and machine.

Both decode greedily from the same prompt in one process, in turns, so that a change in the
machine's load meets both. Reading the prompt is timed apart from decoding.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from rapid_llm.config import SamplingParams
from rapid_llm.decoder import RapidDecoder
from rapid_llm.errors import ContextWindowError, InvalidParameterError

_WARM_UP_TOKENS = 512


@dataclass(frozen=True)
class Run:
    """One generation: seconds to read the prompt, seconds a token after that."""

    prefill: float
    per_token: float


@dataclass(frozen=True)
class Report:
    """What was measured, and where.

    Attributes:
        rapid: runs of our plain decoding, in the order measured.
        generate: runs of transformers' ``generate``; run i followed run i of ``rapid``.
        load_average: of the minute before the first run and of the last minute of the runs, which
            are themselves part of it; empty where the system has none.
    """

    model: str
    dtype: str
    device: str
    attention: str
    context_tokens: int
    new_tokens: int
    torch: str
    transformers: str
    threads: int
    load_average: tuple[float, ...]
    rapid: tuple[Run, ...]
    generate: tuple[Run, ...]

    @property
    def ratio(self) -> float:
        """How many times as fast ours decodes: median against median."""
        return median(r.per_token for r in self.generate) / median(r.per_token for r in self.rapid)

    @property
    def ratio_range(self) -> tuple[float, float]:
        """Least and greatest ratio of two runs that followed one another."""
        ratios = [g.per_token / r.per_token for r, g in zip(self.rapid, self.generate, strict=True)]
        return min(ratios), max(ratios)

    def as_dict(self) -> dict[str, Any]:
        """Every field and both ratios, ready for JSON."""
        return asdict(self) | {"ratio": self.ratio, "ratio_range": self.ratio_range}


def measure(
    decoder: RapidDecoder,
    text: str,
    *,
    context_tokens: int = 7500,
    new_tokens: int = 32,
    repeats: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Time plain decoding with ``decoder`` and with ``generate`` on its target.

    Args:
        decoder: its target is measured; ``generate`` uses the attention that the model was loaded
            with (SDPA unless asked otherwise) and the cache that it chooses (DynamicCache).
        text: repeated or cut to make the prompt.
        context_tokens: tokens of the prompt, at least 1.
        new_tokens: tokens decoded, end-of-sequence tokens ignored; at least 2.
        repeats: runs of each, at least 1, after one that is not counted.
        progress: called with (runs done, runs to do).

    Raises:
        InvalidParameterError: a number is too small.
        ContextWindowError: the prompt and the new tokens exceed the model's window.
    """
    for name, value, least in (
        ("context_tokens", context_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("repeats", repeats, 1),
    ):
        if value < least:
            raise InvalidParameterError(
                f"{name}={value} is not allowed: {name} must be at least {least}"
            )
    target = decoder.target
    if context_tokens + new_tokens > target.context_window:
        raise ContextWindowError(
            f"context_tokens={context_tokens} and new_tokens={new_tokens} exceed the context "
            f"window of {target.name}, {target.context_window} tokens; lower one of them"
        )
    load_before = _load_average()
    prompt = list(islice(cycle(decoder.tokenizer(text)["input_ids"]), context_tokens))
    for run in (_rapid, _generate):
        run(decoder, prompt[:_WARM_UP_TOKENS], new_tokens)
    rapid, generate = [], []
    for i in range(repeats):
        if progress is not None:
            progress(2 * i, 2 * repeats)
        rapid.append(_rapid(decoder, prompt, new_tokens))
        if progress is not None:
            progress(2 * i + 1, 2 * repeats)
        generate.append(_generate(decoder, prompt, new_tokens))
    return Report(
        model=target.name,
        dtype=str(target.model.dtype).removeprefix("torch."),
        device=str(target.device),
        attention=target.config._attn_implementation,
        context_tokens=context_tokens,
        new_tokens=new_tokens,
        torch=torch.__version__,
        transformers=transformers.__version__,
        threads=torch.get_num_threads(),
        load_average=load_before + _load_average(),
        rapid=tuple(rapid),
        generate=tuple(generate),
    )


def _load_average() -> tuple[float, ...]:
    return os.getloadavg()[:1] if hasattr(os, "getloadavg") else ()


def _rapid(decoder: RapidDecoder, prompt: list[int], new_tokens: int) -> Run:
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    stats = decoder.generate(prompt, sampling=sampling).stats
    return Run(stats.prefill_seconds, stats.decode_seconds / stats.completion_tokens)


def _generate(decoder: RapidDecoder, prompt: list[int], new_tokens: int) -> Run:
    ids = torch.tensor([prompt], device=decoder.target.device)
    stamps = _Stamps()
    with torch.inference_mode():
        decoder.target.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            streamer=stamps,
        )
    start, first, *_, last = stamps.times
    return Run(first - start, (last - first) / (new_tokens - 1))


class _Stamps(BaseStreamer):
    """When ``generate`` handed out the prompt (at once), then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
