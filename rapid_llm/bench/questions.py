"""Speed of several questions on one document at once."""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields, replace
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig

from rapid_llm.batching import GenerationRequest, Scheduler
from rapid_llm.bench.report import Row
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.steps import Wanted
from rapid_llm.generation import Generation
from rapid_llm.generation_factory import GenerationFactory
from rapid_llm.progress import PromptProgress
from rapid_llm.request import Request
from rapid_llm.results import Delta


@dataclass(frozen=True)
class CoinFactory(GenerationFactory):
    """Makes generations whose drafted tokens are accepted by coin, with probability a each."""

    a: float = 0.8
    coins: random.Random = field(default_factory=lambda: random.Random(0))

    @classmethod
    def of(cls, factory: GenerationFactory, a: float) -> CoinFactory:
        """A factory over the models and the KV of another."""
        return cls(**{each.name: getattr(factory, each.name) for each in fields(factory)}, a=a)

    def steps(
        self, request: Request, generation: Generation, progress: PromptProgress | None
    ) -> Generator[Wanted | Delta, Any, None]:
        yield from generation.reading(progress)
        stats = generation.stats
        while stats.completion_tokens < request.sampling.max_new_tokens:
            before = stats.drafted_tokens
            tokens = yield from generation.rounding()
            drafted = stats.drafted_tokens - before
            coin = 1 - self.coins.random()  # in (0, 1]
            accepted = min(drafted, int(math.log(coin) / math.log(self.a)))
            # Random tokens, because prompt lookup would find repeated ones.
            width = generation.target.runner.vocab_size
            kept = [*tokens, *self.coins.choices(range(width), k=accepted)][: accepted + 1]
            generation.keep(kept)
            last = stats.completion_tokens >= request.sampling.max_new_tokens
            yield Delta("", tuple(kept), "length" if last else None, replace(stats))


def question_rows(
    counts: Sequence[int],
    ways: Mapping[str, Callable[[int], float | None]],
    turns: Iterable[int],
    simulated: Collection[str] = (),
) -> Iterator[Row]:
    """Rows of tokens/s of so many questions at once, and their ratios to the first number.

    ``ways`` has, by name, a function from a number of questions to tokens/s (None where it cannot
    be told); of those named in ``simulated`` acceptance is. Negative ones of the turns warm up.
    """
    speeds: dict[tuple[str, int], list[float]] = {(way, n): [] for way in ways for n in counts}
    for turn in turns:
        for (way, count), samples in speeds.items():
            speed = ways[way](count)
            if turn >= 0 and speed is not None:
                samples.append(speed)
    for (way, count), samples in speeds.items():
        label, first = f"{way}, {count} question{'s' * (count > 1)} at once", speeds[way, counts[0]]
        columns = {f"÷ {counts[0]}": median(samples) / median(first)} if samples and first else {}
        note = "" if samples else "an answer ended before the last one began"
        key = f"questions_{count}_{way}"
        yield Row(key, label, "tokens/s", samples, note, way in simulated, columns)


def tokens_per_second(
    decoder: RapidDecoder,
    factory: GenerationFactory,
    requests: Sequence[GenerationRequest],
    count: int,
) -> float | None:
    """Tokens a second of the first ``count`` requests together, while all of them decode.

    None if an answer ended before the last one began.
    """
    models: Any = SimpleNamespace(generations=factory, request=decoder.request, max_sequences=count)
    stream = Scheduler(models).stream_many(requests[:count])
    begun: set[int] = set()
    tokens, started, last = 0, 0.0, 0.0
    for index, delta in stream:
        if len(begun) == count:
            tokens += len(delta.token_ids)
            last = time.perf_counter()
        else:
            begun.add(index)
            started = time.perf_counter()
        if delta.finish_reason is not None:
            break
    stream.close()  # type: ignore[attr-defined]
    return tokens / (last - started) if tokens else None


@torch.inference_mode(False)  # its thread writes to what is allocated here
def peer_tokens_per_second(
    model: Any, prompt: list[int], new_tokens: int, count: int
) -> float | None:
    """Tokens a second of transformers' continuous batching, with ``count`` times one prompt.

    Raises:
        RuntimeError: a request failed.
    """
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1)
    with redirect_stdout(sys.stderr):  # where it also writes that a request failed
        answers = model.generate_batch(
            [prompt] * count, generation_config=settings, record_timestamps=True
        ).values()
    errors = [answer.error for answer in answers if answer.error]
    if errors or len(answers) < count:
        raise RuntimeError((errors or ["requests were lost"])[0])
    times = [answer.timestamps for answer in answers]
    begun, end = max(each[0] for each in times), min(each[-1] for each in times)
    tokens = sum(begun < at <= end for each in times for at in each)
    return tokens / (end - begun) if tokens else None
