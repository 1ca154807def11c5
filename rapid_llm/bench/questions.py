"""Speed of several questions on one document at once."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import median
from types import SimpleNamespace
from typing import Any

from rapid_llm.batching import GenerationRequest, Scheduler
from rapid_llm.bench.report import Row
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.steps import Wanted
from rapid_llm.generation import Generation
from rapid_llm.opening import Opener
from rapid_llm.progress import PromptProgress
from rapid_llm.request import Request
from rapid_llm.results import Delta


@dataclass(frozen=True)
class CoinOpener(Opener):
    """Opens generations whose drafted tokens are accepted by coin, with probability a each."""

    a: float = 0.8
    coins: random.Random = field(default_factory=lambda: random.Random(0))

    @classmethod
    def of(cls, opener: Opener, a: float) -> CoinOpener:
        """One for the models and the KV of another."""
        return cls(**{each.name: getattr(opener, each.name) for each in fields(opener)}, a=a)

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
    decoder: RapidDecoder,
    counts: Sequence[int],
    ways: Mapping[str, tuple[Opener, Sequence[GenerationRequest]]],
    repeats: int,
    *,
    simulated: bool = False,
) -> Iterator[Row]:
    """Rows of tokens/s of so many questions at once, and their ratios to the first number.

    Args:
        decoder: the models.
        counts: numbers of questions at once.
        ways: for each way to answer, what opens the generations, and questions on a document whose
            KV is kept, at least the largest count.
        repeats: counted runs of each.
        simulated: whether the acceptance of ways with drafts is simulated.
    """
    for name, (opener, requests) in ways.items():
        speeds: dict[int, list[float]] = {count: [] for count in counts}
        for turn in range(-1, repeats):
            for count in counts:
                speed = tokens_per_second(decoder, opener, requests[:count])
                if turn >= 0:  # the first warms up
                    speeds[count].append(speed)
        for count, samples in speeds.items():
            label = f"{name}, {count} question{'s' * (count > 1)} at once"
            columns = {f"÷ {counts[0]}": median(samples) / median(speeds[counts[0]])}
            key = f"questions_{count}_{name}"
            marked = simulated and isinstance(opener, CoinOpener)
            yield Row(key, label, "tokens/s", samples, simulated=marked, columns=columns)


def tokens_per_second(
    decoder: RapidDecoder, opener: Opener, requests: Sequence[GenerationRequest]
) -> float:
    """Tokens a second of all requests together, while all of them decode."""
    models: Any = SimpleNamespace(
        opener=opener, request=decoder.request, max_sequences=len(requests)
    )
    stream = Scheduler(models).stream_many(requests)
    begun: set[int] = set()
    tokens, started, last = 0, 0.0, 0.0
    for index, delta in stream:
        if len(begun) == len(requests):
            tokens += len(delta.token_ids)
            last = time.perf_counter()
        else:
            begun.add(index)
            started = time.perf_counter()
        if delta.finish_reason is not None:
            break
    stream.close()  # type: ignore[attr-defined]
    return tokens / (last - started) if tokens else math.nan
