"""Base of both benches: measure passes, memory and prefills of a decoder, step by step.

A step that fails is reported, and the others go on. Where only speed counts, KV is random.
"""

from __future__ import annotations

import gc
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from rapid_llm.bench.report import Report, Row, Section
from rapid_llm.bench.timing import Stopwatch, wait_for
from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.kv_cache import kv_shape
from rapid_llm.engine.session import Session
from rapid_llm.shapes import size_of

PASSES = (1, 2, 5, 8, 11, 16)
"""Tokens of the passes that are timed."""

QUESTION = 64  # tokens of a question
_REPEATS = 20
_NUMBERS = {"cuda": 2**30, "cpu": 2**26}  # float32 numbers that are read to measure bandwidth
_READ = 16  # tokens of a prompt that the model reads before random KV is appended
_PIECE = 8192  # tokens of random KV that are written at once
_SHARE = 0.6  # share of a step's time after which no further repeat begins


class Step(NamedTuple):
    """A measurement that becomes a section of the report."""

    name: str
    context: int | None  # tokens of the target's prompt; None where it does not matter
    seconds: float  # limit; the step is skipped if less is left, and repeats less if it is slow
    measure: Callable[[], Iterator[Row]]


class Bench(ABC):
    """Measures steps with one decoder, which take about ``seconds`` at most; ``report`` has all.

    ``facts`` are those of the report beside the machine's, ``room`` is the maximum length of an
    answer and ``draft_tokens`` that of the drafter's context. ``progress`` is a callback, called
    with (name of the measurement, runs done, runs in total).
    """

    def __init__(
        self, decoder: RapidDecoder, facts: dict[str, Any], *, room: int, draft_tokens: int,
        seconds: float,
    ) -> None:  # fmt: skip
        model, place, name = decoder.target.model, decoder.target.device, decoder.target.name
        size = size_of(model.config, name)
        self._decoder, self._model, self._device = decoder, model, place
        self._vocabulary = decoder.target.vocab_size
        self._kv_bytes = size.kv_bytes_per_token // 2 * model.dtype.itemsize
        self._draft_tokens, self._seconds = draft_tokens, seconds
        self._sampling = SamplingParams(temperature=1, max_new_tokens=room, ignore_eos=True)
        self._random = random.Random(0)
        self._began = time.perf_counter()
        self.progress: Callable[[str, int, int], None] = lambda what, done, total: None
        machine = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(place) if self._on_gpu else place.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "parameters": size.parameters,
            "draft_tokens": draft_tokens,
        }
        self.report = Report(Path(name).name, facts | machine)

    @abstractmethod
    def steps(self) -> Iterator[Step]:
        """The steps in order; those that others are compared with come first."""

    def run(self) -> Iterator[Section]:
        """Run the steps and yield the section of each."""
        for name, context, seconds, measure in self.steps():
            started = time.perf_counter()
            rows: list[Row] = []
            failed = None
            if seconds > self._seconds - (started - self._began):
                failed = f"too little time is left of {self._seconds:.0f} s"
            else:
                self.progress(name, 0, 1)
                self._until = started + _SHARE * seconds
                try:
                    with torch.inference_mode():
                        rows.extend(measure())  # rows before a failure are kept
                except Exception as error:
                    failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self._decoder.clear_cache()  # the next steps need the memory
            gc.collect()
            if self._on_gpu:
                torch.cuda.empty_cache()
            now = time.perf_counter()
            self.report.seconds = now - self._began
            self.report.sections.append(Section(name, context, rows, failed, now - started))
            yield self.report.sections[-1]

    # --- measurements of both benches ----------------------------------------------------------

    def _memory(self) -> Iterator[Row]:
        """Memory bandwidth, from sums over more numbers than caches hold."""
        watch = Stopwatch(self._device)
        block = torch.ones(_NUMBERS[self._device.type], device=self._device)
        for _ in self._turns(10, watch):
            with watch("read"):
                block.sum()
        gb = [block.nbytes / seconds / 1e9 for seconds in watch.samples()["read"]]
        yield Row("bandwidth_read", "memory read", "GB/s", gb, "by a sum; the best counts")

    def _passes(self, context: int) -> Iterator[Row]:
        with self._open(context, draft=False) as generation:
            session, length = generation.target, generation.target.length
            batches = {n: torch.tensor(self._tokens(n), device=self._device) for n in PASSES}
            watch = Stopwatch(self._device)
            for _ in self._turns(_REPEATS, watch, warm=3):
                session.extend(batches[1])  # from here on the device never waits for the host
                session.rollback(length)
                for n, tokens in batches.items():
                    with watch(n):
                        session.extend(tokens)
                    session.rollback(length)
            samples = watch.samples()
        for n, seconds in samples.items():
            name = "plain step, 1 token" if n == 1 else f"pass of {n} tokens"
            yield Row(f"pass_{n}", name, "ms", [1000 * s for s in seconds])
        for n in PASSES[1:]:
            ratios = [a / b for a, b in zip(samples[n], samples[1], strict=True)]
            yield Row(f"pass_{n}_to_1", f"pass of {n} ÷ of 1", "", ratios)
        if bandwidth := self.report.row("bandwidth_read"):
            read = sum(p.nbytes for p in self._model.parameters()) + self._kv_bytes * context
            limit = 1000 * read / (max(bandwidth.samples) * 1e9)
            yield Row("limit", "memory limit: weights + KV", "ms", [limit], f"{read / 1e9:.3g} GB")
            share = [100 * limit / (1000 * s) for s in samples[1]]
            yield Row("share", "plain step, share of the limit", "%", share, "the device's time")

    def _prefill(self, context: int) -> Iterator[Row]:
        """Prefill of a new document, then first tokens of questions with other last tokens."""
        first = self._tokens(context)
        self._first_token(first[: 2 * self._draft_tokens], None)
        self._decoder.clear_cache()
        held = self._allocated()
        asked, stats = self._first_token(first, None)
        seconds, peak = stats.prefill_seconds, self._allocated(peak=True)
        yield Row("prefill", "prefill", "s", [seconds], f"{context / seconds:,.0f} tokens/s")
        if self._on_gpu:
            kv = self._kv_bytes * (context + self._sampling.max_new_tokens)
            more = (peak - held - kv) / 1e9
            yield Row("prefill_memory", "its peak memory over weights + KV", "GB", [more])
        yield Row("first_question", "first token, first question", "s", [asked])
        again: dict[str, list[float]] = {"plain": [], "RAPID": []}
        for _ in range(3):
            for name, times in again.items():
                question = first[:-QUESTION] + self._tokens(QUESTION)
                retrieved = self._tokens(self._draft_tokens) if name == "RAPID" else None
                times.append(self._first_token(question, retrieved)[0])
        for name, (_, *times) in again.items():  # the first call also measures the pass costs
            read = f"drafter reads {self._draft_tokens:,} tokens anew" if name == "RAPID" else ""
            key = f"second_question_{name.lower()}"
            yield Row(key, f"first token, next question, {name}", "s", times, read)
            shares = [100 * s / asked for s in times]
            yield Row(f"{key}_share", "÷ the first question's", "%", shares)

    # --- helpers -------------------------------------------------------------------------------

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _turns(self, counted: int, watch: Stopwatch | None = None, warm: int = 1) -> Iterator[int]:
        """Numbers of repeats from ``-warm`` on, as far as the step's time allows, but at least 0.

        Negative ones warm up; the watch is cleared after them.
        """
        for turn in range(-warm, counted):
            if turn > 0 and time.perf_counter() > self._until:
                return
            if turn == 0 and watch is not None:
                watch.clear()
            yield turn
            wait_for(self._device)

    def _tokens(self, n: int, seed: int | None = None) -> list[int]:
        """Random tokens, the same ones for a seed."""
        drawn = self._random if seed is None else random.Random(seed)
        return drawn.choices(range(self._vocabulary), k=n)

    @contextmanager
    def _open(self, context: int, *, draft: bool, gamma: int = 1) -> Iterator[Any]:
        """A generation whose target has read a prompt of ``context`` tokens.

        Its KV is random the first time; later generations reuse whole chunks of it.
        """
        prompt = self._tokens(context, context)
        retrieved = self._tokens(self._draft_tokens, self._draft_tokens) if draft else None
        speculation = SpeculationConfig(gamma=gamma)
        request = self._decoder.request(
            prompt, retrieved, sampling=self._sampling, speculation=speculation
        )
        with self._decoder.generations.open(request, time.perf_counter()) as generation:
            if generation.target.length == 0:
                self._decoder.clear_cache()  # no other kept KV is used again
            self._fill(generation.target, prompt[:-1])
            generation.prefill(None)
            yield generation

    def _fill(self, session: Session, prompt: list[int]) -> None:
        """Fill a cache with random KV after a few tokens that the model reads, as its origin."""
        if session.length == 0:
            session.prefill(prompt[:_READ])
        for start in range(session.length, len(prompt), _PIECE):
            key, value = self._random_kv(min(_PIECE, len(prompt) - start))
            for layer in session.cache.layers:
                layer.update(key, value)

    def _random_kv(self, tokens: int) -> torch.Tensor:
        """Keys and values, ``[2, 1, kv_heads, tokens, head_dim]``."""
        _, heads, dim = kv_shape(self._model.config.get_text_config())
        shape = 2, 1, heads, tokens, dim
        return torch.randn(shape, dtype=self._model.dtype, device=self._device)

    def _first_token(self, prompt: list[int], retrieved: list[int] | None) -> tuple[float, Any]:
        """Seconds from the call to the first round's tokens, and the stats at that time."""
        stream = self._decoder.stream(prompt, retrieved, sampling=self._sampling)
        stats = next(stream).stats
        stream.close()  # type: ignore[attr-defined]
        assert stats.time_to_first_token is not None
        return stats.time_to_first_token, stats

    def _allocated(self, peak: bool = False) -> int:
        """Bytes allocated on a GPU now, which resets the peak; or the peak since the last call."""
        if not self._on_gpu:
            return 0
        if peak:
            return torch.cuda.max_memory_allocated(self._device)
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)
