"""What the engine does with a model of a named shape: random weights, and KV that nobody read.

Every number that does not depend on what is said: passes, draft steps, whole rounds, prefills, and
transformers beside them. How many drafted tokens are accepted does depend on it, so that is thrown
by a coin, and every row that rests on it says so.

A section that fails is reported so and costs the others nothing; each has a limit of time, and all
together have one.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from rapid_llm.bench.shapes import named_shape, number_tokenizer, random_model
from rapid_llm.bench.timing import Stamps, Stopwatch, host_calls, time_limit, wait_for
from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.costs import pass_cost
from rapid_llm.engine.forward import Forward
from rapid_llm.engine.kv_cache import cache_argument
from rapid_llm.engine.session import Session
from rapid_llm.errors import InvalidParameterError
from rapid_llm.models import device_memory
from rapid_llm.speculation.drafters.rag import RagDrafter
from rapid_llm.speculation.sampling import Sampler
from rapid_llm.speculation.schedule import AdaptiveSchedule, Belief

PASSES = (1, 2, 5, 8, 11, 16)
"""Tokens of the passes that are timed."""

SIMULATED = "acceptance simulated by a coin"

_DRAFT_TOKENS = 4096  # of the drafter's context
_ROOM = 512  # tokens of an answer
_REPEATS = 20
_ROUNDS = 12  # of a block; blocks of all methods take turns
_TURNS = 5
_FORCED = 3  # γ where the schedule would not draft
_SURE = 1e6  # throws of the coin that the schedule is told of
_STEPS = 8  # of a draft
_QUESTION = 64  # tokens
_GENERATIONS = 4  # of transformers, the first not counted
_GENERATED = 6  # tokens of each
_NUMBERS = {"cuda": 2**30, "cpu": 2**26}  # float32, to measure the memory with
_READ = 16  # tokens of a prompt that are read, before KV is made up
_PIECE = 8192  # of KV written at once
_SHARE = 0.6  # of a section's time after which no further repeat begins
_SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=_ROOM, ignore_eos=True)


@dataclass(frozen=True)
class Row:
    """A quantity. ``note`` says what a number alone would not; ``simulated``, that a coin decided
    what was accepted."""

    key: str
    label: str
    unit: str
    samples: list[float]
    note: str = ""
    simulated: bool = False

    @property
    def median(self) -> float | None:
        """None where nothing could be measured."""
        return median(self.samples) if self.samples else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"median": self.median}


@dataclass(frozen=True)
class Section:
    """What belongs together, at a context length or (None) at any.

    Attributes:
        failed: why there are not all rows; None where there are.
        seconds: that measuring took.
    """

    name: str
    context: int | None
    rows: list[Row]
    failed: str | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rows": [row.as_dict() for row in self.rows]}


@dataclass
class ShapeReport:
    """Where and of what; ``sections`` grow while it is measured."""

    shape: str
    dtype: str
    device: str
    torch: str
    transformers: str
    parameters: int
    draft_tokens: int
    sections: list[Section] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return any(section.failed for section in self.sections)

    def row(self, key: str, context: int | None = None) -> Row | None:
        """None where it was not measured."""
        rows = (row for s in self.sections if s.context == context for row in s.rows)
        return next((row for row in rows if row.key == key), None)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "weights": "random",
            "acceptance": SIMULATED,
            "sections": [section.as_dict() for section in self.sections],
        }


class ShapeBench:
    """Measures one shape.

    Args:
        shape: a name of :data:`rapid_llm.bench.shapes.SHAPES`.
        contexts: tokens of the target's prompt, at least 256 each.
        acceptances: probabilities that a drafted token is accepted, in (0, 1).
        dtype: of weights and KV.
        device: where to.
        seconds: in which all is to be measured, about.

    Raises:
        InvalidParameterError: an unknown shape, a number out of range, or a model that the device
            has no memory for.
    """

    def __init__(
        self,
        shape: str,
        contexts: Sequence[int],
        acceptances: Sequence[float],
        dtype: torch.dtype,
        device: torch.device,
        seconds: float,
    ) -> None:
        for name, value, ok, limit in (
            *(("context", n, n >= 256, "at least 256") for n in contexts),
            *(("acceptance", a, 0 < a < 1, "between 0 and 1") for a in acceptances),
        ):
            if not ok:
                raise InvalidParameterError(
                    f"{name}={value!r} is not allowed: {name} must be {limit}"
                )
        size = named_shape(shape)
        self._kv_bytes = size.kv_per_token * dtype.itemsize
        needed = size.parameters * dtype.itemsize + self._kv_bytes * max(contexts)
        memory = device_memory(device)
        if memory is not None and needed > memory:
            raise InvalidParameterError(
                f"{shape} with {max(contexts):,} tokens needs {needed / 1e9:.0f} GB, more than "
                f"the {memory / 1e9:.0f} GB of {device}; take a smaller shape or context"
            )
        self._began, self._seconds = time.perf_counter(), seconds
        self._contexts, self._acceptances = contexts, acceptances
        self._device, self._dtype = device, dtype
        self._draft_tokens = min(_DRAFT_TOKENS, min(contexts) // 2)
        self._model = random_model(size, max(contexts) + 2 * _ROOM, dtype, device)
        self._weight_bytes = sum(p.nbytes for p in self._model.parameters())
        self._unread_bytes = size.embedding * dtype.itemsize
        self._tokenizer = number_tokenizer(size.vocabulary)
        # The bench itself decides which KV goes.
        self._decoder = RapidDecoder(self._model, self._tokenizer, name=shape, kv_cache_bytes=2**62)
        self._random = random.Random(0)
        self._gamma = _FORCED  # of the rounds whose calls are counted
        self._vocabulary = size.vocabulary
        self.report = ShapeReport(
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            torch=torch.__version__,
            transformers=transformers.__version__,
            parameters=size.parameters,
            draft_tokens=self._draft_tokens,
        )

    def run(self) -> Iterator[Section]:
        """Measure, a section after another, those first that others are compared with."""
        yield self._measured("memory", None, 20, self._bandwidth)
        yield self._measured("draft steps", None, 60, self._draft_steps)
        for context in self._contexts:
            yield self._measured("passes", context, 40, self._passes)
            yield self._measured("rounds", context, 40, self._rounds)
            if self._device.type == "cuda":
                yield self._measured("host calls", context, 30, self._host_calls)
            yield self._measured("transformers", context, 25, self._generate)
        for context in self._contexts:
            yield self._measured("prefill", context, 75, self._prefill)
        for context in self._contexts:
            yield self._measured("static cache", context, 90, self._generate_static)

    def _measured(
        self, name: str, context: int | None, limit: float, measure: Callable[..., Iterator[Row]]
    ) -> Section:
        started = time.perf_counter()
        left = self._seconds - (started - self._began)
        limit = min(limit, left)
        rows: list[Row] = []
        failed = None
        if limit < 2:
            failed = f"no time is left of {self._seconds:.0f} s"
        else:
            self._until = started + _SHARE * limit
            try:
                with time_limit(limit), torch.inference_mode():
                    # What came before a failure stays.
                    rows.extend(measure() if context is None else measure(context))
            except Exception as error:
                failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self._decoder.clear_cache()  # other sections need the memory, and make up KV in no time
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        now = time.perf_counter()
        section = Section(name, context, rows, failed, now - started)
        self.report.sections.append(section)
        self.report.seconds = now - self._began
        return section

    # --- what is measured --------------------------------------------------------------------

    def _bandwidth(self) -> Iterator[Row]:
        """Of sums and copies that no cache holds."""
        watch = Stopwatch[str](self._device)
        block = torch.ones(_NUMBERS[self._device.type], device=self._device)
        other = torch.empty_like(block)
        for turn in self._turns(10):
            if turn == 0:
                watch.clear()
            with watch("read"):
                block.sum()
            with watch("copied"):
                other.copy_(block)
        for key, seconds in watch.samples().items():
            moved = block.nbytes * (2 if key == "copied" else 1)
            note = "read and written" if key == "copied" else "by a sum; the best counts"
            gb = [moved / s / 1e9 for s in seconds]
            yield Row(f"bandwidth_{key}", f"memory {key}", "GB/s", gb, note)

    def _draft_steps(self) -> Iterator[Row]:
        """A step of the drafter over its context, sampler included, in each precision."""
        forwards, refused = {}, []
        precisions: tuple[Any, ...] = None, "int8", "int4"
        for quantization in precisions:
            name = quantization or self.report.dtype
            try:
                decoder = RapidDecoder(
                    self._model, self._tokenizer, drafter_quantization=quantization
                )
            except InvalidParameterError:
                refused.append(name)
                continue
            forwards[name] = decoder.draft_forward
        drafters = {name: self._drafter(forward) for name, forward in forwards.items()}
        watch = Stopwatch[str](self._device)
        for turn in self._turns(_REPEATS, warm=2):
            if turn == 0:
                watch.clear()
            for name, drafter in drafters.items():
                with watch(name):
                    drafter.draft([], _STEPS, look_ahead=False)
        chosen = self._decoder.draft_forward.model
        for name, seconds in watch.samples().items():
            note = "what the decoder takes" if forwards[name].model is chosen else ""
            ms = [1000 * s / _STEPS for s in seconds]
            yield Row(f"draft_{name}", f"draft step, {name}", "ms", ms, note)
        for name in refused:
            yield Row(f"draft_{name}", f"draft step, {name}", "ms", [], "refused on this device")

    def _passes(self, context: int) -> Iterator[Row]:
        with self._open(context, draft=False) as generation:
            session, length = generation.target, generation.target.length
            batches = {n: torch.tensor(self._tokens(n), device=self._device) for n in PASSES}
            watch = Stopwatch[int](self._device)
            for turn in self._turns(_REPEATS, warm=3):
                if turn == 0:
                    watch.clear()
                session.extend(batches[1])  # the host is ahead from here on
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
        bandwidth = self.report.row("bandwidth_read")
        if bandwidth is not None:
            best = max(bandwidth.samples) * 1e9
            read = self._weight_bytes + self._kv_bytes * context
            limit = 1000 * read / best
            less = 1000 * (read - self._unread_bytes) / best
            yield Row("limit", "memory limit: weights + KV", "ms", [limit], f"{read / 1e9:.1f} GB")
            yield Row("limit_read", "without the input embedding", "ms", [less], "no step reads it")
            share = [100 * limit / (1000 * s) for s in samples[1]]
            yield Row("share", "plain step, share of the limit", "%", share, "the device's time")

    def _rounds(self, context: int) -> Iterator[Row]:
        """Blocks of plain rounds and of RAPID's, in turns; a round ends with its host sync."""
        with self._open(context, draft=False) as generation:
            cost = pass_cost(generation.target)
        draft_cost = self._drafter(self._decoder.draft_forward).cost()
        gammas = {}
        for a in self._acceptances:
            belief = Belief(a * _SURE, _SURE)
            gammas[a] = AdaptiveSchedule(cost, draft_cost, belief).next(0)
        plain: list[float] = []
        rounds: dict[float, list[tuple[float, float]]] = {a: [] for a in self._acceptances}
        for turn in self._turns(_TURNS):
            n = 3 if turn < 0 else _ROUNDS
            with self._open(context, draft=False) as generation:
                seconds, _ = self._block(generation, n, 0.5)
                plain.append(1000 * seconds / n)
            for a, gamma in gammas.items():
                with self._open(context, draft=True, gamma=gamma or _FORCED) as generation:
                    seconds, tokens = self._block(generation, n, a)
                    rounds[a].append((1000 * seconds / n, tokens / n))
        del plain[0]
        yield Row("plain", "plain decoding", "ms/token", plain, "with its host sync")
        limit = self.report.row("limit", context)
        if limit is not None and limit.median is not None:
            share = [100 * limit.median / ms for ms in plain]
            yield Row("plain_share", "plain decoding, share of the limit", "%", share)
        for a, measured in rounds.items():
            counted = measured[1:]
            gamma = gammas[a] or _FORCED
            note = f"γ = {gamma}"
            if gammas[a] == 0:
                note += ", though the schedule would draft nothing"
            name = f"rapid_{a:g}"
            yield Row(
                f"{name}_round", f"round, a = {a:g}", "ms", [ms for ms, _ in counted], note, True
            )
            yield Row(
                f"{name}_tokens", f"tokens a round, a = {a:g}", "", [t for _, t in counted],
                note, True,
            )  # fmt: skip
            speedups = [p * t / ms for p, (ms, t) in zip(plain, counted, strict=True)]
            yield Row(f"{name}_speedup", f"RAPID ÷ plain, a = {a:g}", "×", speedups, note, True)
        self._gamma = max(gammas.values()) or _FORCED

    def _host_calls(self, context: int) -> Iterator[Row]:
        """Kernels, graphs and waits of a round."""
        gamma = self._gamma
        for name, draft in (("plain", False), ("RAPID", True)):
            with self._open(context, draft=draft, gamma=gamma) as generation:
                self._block(generation, 1, 0.5)
                calls = host_calls(partial(self._block, generation, 1, 0.5), self._device)
            note = f"γ = {gamma}" if draft else ""
            for key, what in (("launches", "kernels launched"), ("graphs", "graphs replayed"),
                              ("waits", "host synchronisations")):  # fmt: skip
                count = getattr(calls, key)
                yield Row(f"{name.lower()}_{key}", f"{what} a {name} round", "", [count], note)

    def _generate(self, context: int) -> Iterator[Row]:
        seconds = self._generated(partial(DynamicCache, config=self._model.config), context)
        yield from self._beside("generate", "transformers generate", seconds, context)

    def _generate_static(self, context: int) -> Iterator[Row]:
        room = context + _GENERATIONS * _GENERATED
        static = partial(StaticCache, config=self._model.config, max_cache_len=room)
        started = time.perf_counter()
        seconds = self._generated(static, context)
        waited = time.perf_counter() - started - sum(seconds) * _GENERATED
        compiled = self._device.type == "cuda"
        note = f"after {waited:.0f} s to compile" if compiled else "not compiled on a CPU"
        yield from self._beside("static", "generate, static cache", seconds, context, note)

    def _beside(
        self, key: str, label: str, seconds: list[float], context: int, note: str = ""
    ) -> Iterator[Row]:
        """A peer's seconds a token, and how many times as fast we decode."""
        yield Row(key, label, "ms/token", [1000 * s for s in seconds], note)
        peer = 1000 * median(seconds)
        plain = self.report.row("plain", context)
        if plain is None:
            return
        yield Row(
            f"plain_to_{key}", "plain, times as fast", "×", [peer / ms for ms in plain.samples]
        )
        for a in self._acceptances:
            speedup = self.report.row(f"rapid_{a:g}_speedup", context)
            if speedup is not None:
                ratios = [
                    peer / ms * s for ms, s in zip(plain.samples, speedup.samples, strict=True)
                ]
                yield Row(
                    f"rapid_{a:g}_to_{key}", f"RAPID, times as fast, a = {a:g}", "×", ratios,
                    speedup.note, True,
                )  # fmt: skip

    def _prefill(self, context: int) -> Iterator[Row]:
        first = self._tokens(context)
        self._warm_up_prefill(first)
        held = self._allocated()
        asked, stats = self._first_token(first, None)
        seconds, peak = [stats.prefill_seconds], self._allocated(peak=True)
        yield Row("prefill", "prefill", "s", seconds, f"{context / seconds[0]:,.0f} tokens/s")
        if self._device.type == "cuda":
            kv = self._kv_bytes * (context + _ROOM)
            more = (peak - held - kv) / 1e9
            yield Row("prefill_memory", "its peak memory over weights + KV", "GB", [more])
        yield Row("first_question", "first token, first question", "s", [asked])
        again: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(3):
            for draft, times in again.items():
                question = first[:-_QUESTION] + self._tokens(_QUESTION)
                retrieved = self._tokens(self._draft_tokens) if draft else None
                times.append(self._first_token(question, retrieved)[0])
        for draft, name in ((False, "plain"), (True, "RAPID")):
            times = again[draft][1:]  # the first measures what passes cost here
            note = f"drafter reads {self._draft_tokens:,} tokens anew" if draft else ""
            key = f"second_question_{name.lower()}"
            yield Row(key, f"first token, next question, {name}", "s", times, note)
            shares = [100 * s / asked for s in times]
            yield Row(f"{key}_share", "÷ the first question's", "%", shares)
        self._decoder.clear_cache()
        ids = torch.tensor([first], device=self._device)
        self._read_by_transformers(ids[:, : min(context, 2 * _DRAFT_TOKENS)])
        held = self._allocated()
        theirs = self._read_by_transformers(ids)
        yield Row("prefill_transformers", "transformers' prefill", "s", [theirs], "in one pass")
        if self._device.type == "cuda":
            more = (self._allocated(peak=True) - held - self._kv_bytes * context) / 1e9
            yield Row("prefill_transformers_memory", "its peak over weights + KV", "GB", [more])
        yield Row("prefill_ratio", "prefill ÷ transformers'", "", [seconds[0] / theirs])

    # --- how ---------------------------------------------------------------------------------

    def _turns(self, counted: int, warm: int = 1) -> Iterator[int]:
        """Numbers of repeats, negative ones to warm up; at least 0, more where there is time."""
        for turn in range(-warm, counted):
            if turn > 0 and time.perf_counter() > self._until:
                return
            yield turn
            wait_for(self._device)

    def _tokens(self, n: int) -> list[int]:
        return self._random.choices(range(self._vocabulary), k=n)

    @contextmanager
    def _open(self, context: int, *, draft: bool, gamma: int = 1) -> Iterator[Any]:
        """A generation whose target holds a prompt of so many tokens.

        The KV is made up the first time, then whole chunks of it are taken over from the generation
        before.
        """
        retrieved = self._prompt(self._draft_tokens) if draft else None
        prompt = self._prompt(context)
        request = self._decoder._prepare(
            prompt, retrieved, _SAMPLING, SpeculationConfig(gamma=gamma), 1.0, {}
        )
        with self._decoder._open(request) as generation:
            if generation.target.length == 0:
                self._decoder.clear_cache()  # whatever else is kept has no use any more
            self._fill(generation.target, prompt[:-1])
            generation.prefill(None)
            yield generation

    def _prompt(self, n: int) -> list[int]:
        """The same for the same length."""
        return random.Random(n).choices(range(self._vocabulary), k=n)

    def _fill(self, session: Session, prompt: list[int]) -> None:
        """The model itself reads the first tokens, so that the cache is known to be its own."""
        if session.length == 0:
            session.prefill(prompt[:_READ])
        for start in range(session.length, len(prompt), _PIECE):
            key, value = self._random_kv(min(_PIECE, len(prompt) - start))
            for layer in session.cache.layers:
                layer.update(key, value)

    def _random_kv(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``[1, kv_heads, tokens, head_dim]``, twice."""
        config = self._model.config
        shape = 1, config.num_key_value_heads, tokens, config.head_dim
        key, value = (torch.randn(shape, dtype=self._dtype, device=self._device) for _ in range(2))
        return key, value

    def _drafter(self, forward: Forward) -> Any:
        """Draws without lookup: nothing in random tokens is worth a guess."""
        prompt = self._prompt(self._draft_tokens)
        session = Session(forward, forward.new_cache(self._draft_tokens + _ROOM))
        self._fill(session, prompt[:-1])
        sampler = Sampler(_SAMPLING, prompt, forward.device, forward.model)
        config = SpeculationConfig(lookup=False)
        return RagDrafter(session, prompt, sampler, self._vocabulary, config)

    def _block(self, generation: Any, rounds: int, a: float) -> tuple[float, int]:
        """Seconds and tokens of some rounds in which a coin, not the target, accepts.

        Draws are stratified: each round's number accepted follows the coin's law, P(n ≥ k) = aᵏ,
        and all of a block's together are near its mean.
        """
        draws = [(i + self._random.random()) / rounds for i in range(rounds)]
        self._random.shuffle(draws)
        said = 0
        started = time.perf_counter()
        for draw in draws:
            before = generation.stats.drafted_tokens
            tokens = generation.round()
            drafted = generation.stats.drafted_tokens - before
            accepted = min(drafted, int(math.log(1 - draw) / math.log(a)))
            # Other tokens in each round: the drafter looks up what repeats.
            generation.keep([*tokens, *self._tokens(accepted)][: accepted + 1])
            said += accepted + 1
        wait_for(self._device)
        return time.perf_counter() - started, said

    @torch.inference_mode(False)
    @torch.no_grad()
    def _generated(self, make_cache: Callable[[], Cache], context: int) -> list[float]:
        """Seconds a token of transformers' ``generate`` behind made-up KV, the first run apart.

        Without gradients, as it runs by itself: what it compiles may not like inference mode.
        """
        cache = make_cache()
        key, value = self._random_kv(context)
        for layer in range(self._model.config.num_hidden_layers):
            cache.update(key, value, layer)
        generate: Any = self._model.generate
        seconds = []
        for run in range(_GENERATIONS):
            # Each run goes on behind the one before, whose last token was not read.
            ids = torch.tensor([self._tokens(context + run * _GENERATED + 1)], device=self._device)
            stamps = Stamps()
            generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=_GENERATED,
                max_new_tokens=_GENERATED,
                streamer=stamps,
                **{cache_argument(generate): cache},
            )
            seconds.append(stamps.per_token)
        return seconds[1:]

    def _first_token(self, prompt: list[int], retrieved: list[int] | None) -> tuple[float, Any]:
        """Seconds from the call to the first round's tokens, and what the decoder counted."""
        sampling = SamplingParams(max_new_tokens=_ROOM, temperature=1.0, ignore_eos=True)
        stream = self._decoder.stream(prompt, retrieved, sampling=sampling)
        stats = next(stream).stats
        stream.close()  # type: ignore[attr-defined]
        assert stats.time_to_first_token is not None
        return stats.time_to_first_token, stats

    def _warm_up_prefill(self, prompt: list[int]) -> None:
        self._first_token(prompt[: 2 * _DRAFT_TOKENS], None)
        self._decoder.clear_cache()

    def _read_by_transformers(self, ids: torch.Tensor) -> float:
        started = time.perf_counter()
        self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
        wait_for(self._device)
        return time.perf_counter() - started

    def _allocated(self, peak: bool = False) -> int:
        """Bytes on a GPU now, from which the next peak is counted; or the peak since."""
        if self._device.type != "cuda":
            return 0
        if peak:
            return torch.cuda.max_memory_allocated(self._device)
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)
