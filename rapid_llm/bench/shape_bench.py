"""Measure the engine on a model of a named shape, with random weights and random KV.

This covers all times that do not depend on the text, for our engine and for transformers. The
number of accepted tokens depends on the text, so it is simulated, and rows that depend on it are
marked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from rapid_llm.batching import GenerationRequest
from rapid_llm.bench.base import QUESTION, Bench, Step
from rapid_llm.bench.questions import CoinFactory, question_rows, tokens_per_second
from rapid_llm.bench.report import Row
from rapid_llm.bench.speed_model import require
from rapid_llm.bench.timing import Stamps, Stopwatch, host_calls, wait_for
from rapid_llm.config import SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.device_maps import resolve_device
from rapid_llm.engine.costs import pass_cost
from rapid_llm.engine.kv_cache import cache_argument
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.session import Session
from rapid_llm.errors import InvalidParameterError
from rapid_llm.models import device_memory
from rapid_llm.shapes import number_tokenizer, random_model, shape_config, size_of
from rapid_llm.speculation.drafters.rag import RagDrafter
from rapid_llm.speculation.sampling import Sampler
from rapid_llm.speculation.schedule import AdaptiveSchedule, Prior

_DRAFT_TOKENS, _ROOM = 4096, 512  # tokens of the drafter's context, and of an answer
_REPEATS = 20
_ROUNDS = 12  # rounds of a block; blocks of all methods take turns
_TURNS = 5
_ASKED = 48  # tokens of each answer where several questions are asked at once
_FORCED = 3  # γ where the schedule would not draft
_SURE = 1e6  # number of past tokens from which the schedule takes its acceptance rate
_NO_LOOKUP = SpeculationConfig(lookup=False)
_STEPS = 8  # steps of a draft
_GENERATIONS, _GENERATED = 4, 6  # generations of transformers (the first warms up), tokens of each


class ShapeBench(Bench):
    """Measures one of :data:`rapid_llm.shapes.NAMES` on the first GPU, or else the CPU.

    ``contexts`` are tokens of the target's prompt, at least 256 each, ``acceptances`` probabilities
    that a drafted token is accepted, in (0, 1), and ``questions`` numbers to ask at once as well;
    dtype ``auto`` is bfloat16. ``seconds`` is the time limit of all steps.

    Raises:
        InvalidParameterError: an unknown shape, a number out of range, or too little memory.
    """

    def __init__(
        self, shape: str, contexts: Sequence[int], acceptances: Sequence[float], dtype: str,
        seconds: float, questions: Sequence[int] = (),
    ) -> None:  # fmt: skip
        for name, value, ok, limit in (
            *(("context", n, n >= 256, "at least 256") for n in contexts),
            *(("acceptance", a, 0 < a < 1, "between 0 and 1") for a in acceptances),
        ):
            require(ok, name, value, limit)
        device, longest = resolve_device(None), max(contexts)
        wanted: torch.dtype = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        config = shape_config(shape, longest + 2 * _ROOM)
        size = size_of(config, shape)
        needed = (size.weight_bytes + size.kv_bytes_per_token * longest) / 2 * wanted.itemsize
        memory = device_memory(device)
        if memory is not None and needed > memory:
            raise InvalidParameterError(
                f"{shape} with {longest:,} tokens needs {needed / 1e9:.0f} GB, more than the "
                f"{memory / 1e9:.0f} GB of {device}; take a smaller shape or context"
            )
        self._contexts, self._acceptances, self._questions = contexts, acceptances, questions
        model, tokenizer = random_model(config, wanted, device), number_tokenizer(config.vocab_size)
        unlimited: dict[str, Any] = dict.fromkeys(("kv_cache_bytes", "kv_cache_host_bytes"), 2**62)
        decoder = RapidDecoder(model, tokenizer, name=shape, **unlimited)  # the bench itself frees
        simulated = "simulated in rows marked *, because random weights accept at random"
        facts = {"shape": shape, "weights": "random", "KV": "random", "acceptance": simulated}
        facts |= {"rows": "medians (range) at temperature 1"}
        draft_tokens = min(_DRAFT_TOKENS, min(contexts) // 2)
        super().__init__(decoder, facts, room=_ROOM, draft_tokens=draft_tokens, seconds=seconds)
        self._gamma = _FORCED  # γ of the rounds whose host calls are counted

    def steps(self) -> Iterator[Step]:
        yield Step("memory", None, 2, self._memory)
        yield Step("draft steps", None, 20, self._draft_steps)
        for n in self._contexts:
            yield Step("passes", n, 15, partial(self._passes, n))
            yield Step("rounds", n, 25, partial(self._rounds, n))
            if self._questions and n == max(self._contexts):
                yield Step("questions at once", n, 25, partial(self._asked, n))
            if self._on_gpu:
                yield Step("host calls", n, 5, partial(self._host_calls, n))
            make = partial(DynamicCache, config=self._model.config)
            generate = partial(self._generate, "generate", "transformers generate", n, make)
            yield Step("transformers", n, 10, generate)
        for n in self._contexts:
            yield Step("prefill", n, 40, partial(self._prefills, n))
            if self._on_gpu:
                yield Step("host tier", n, 40, partial(self._host_tier, n))
        for n in self._contexts:
            room = n + _GENERATIONS * _GENERATED
            make = partial(StaticCache, config=self._model.config, max_cache_len=room)
            generate = partial(self._generate, "static", "generate, static cache", n, make)
            yield Step("static cache", n, 60, generate)  # which is compiled on a GPU

    # --- measurements --------------------------------------------------------------------------

    def _draft_steps(self) -> Iterator[Row]:
        """Steps of the drafter over its context, including the sampler, for each weight format."""
        forwards: dict[str, ModelRunner | None] = {}
        for name in (self.report.facts["dtype"], "int8", "int4"):
            kind: Any = None if name not in ("int8", "int4") else name
            try:
                tokenizer = self._decoder.tokenizer
                decoder = RapidDecoder(self._model, tokenizer, drafter_quantization=kind)
                forwards[name] = decoder.draft_runner
            except InvalidParameterError:
                forwards[name] = None
        drafters = {name: self._drafter(each) for name, each in forwards.items() if each}
        watch = Stopwatch(self._device)
        for _ in self._turns(_REPEATS, watch, warm=2):
            for name, drafter in drafters.items():
                with watch(name):
                    drafter.draft([], _STEPS, look_ahead=False)
        samples, chosen = watch.samples(), self._decoder.draft_runner.model
        for name, runner in forwards.items():
            note = "" if runner else "refused on this device"
            note = "the decoder's choice" if runner and runner.model is chosen else note
            ms = [1000 * s / _STEPS for s in samples.get(name, [])]
            yield Row(f"draft_{name}", f"draft step, {name}", "ms", ms, note)

    def _rounds(self, context: int) -> Iterator[Row]:
        """Blocks of plain rounds and of RAPID's in turns; each round ends with its host sync."""
        with self._open(context, draft=False) as generation:
            cost = pass_cost(generation.target)
        draft_cost = self._drafter(self._decoder.draft_runner).cost()
        chosen = {
            a: AdaptiveSchedule(cost, draft_cost, Prior(a * _SURE, _SURE)).next(0)
            for a in self._acceptances
        }
        plain: list[float] = []
        rounds: dict[float, list[tuple[float, float]]] = {a: [] for a in self._acceptances}
        for turn in self._turns(_TURNS):
            n = 3 if turn < 0 else _ROUNDS
            with self._open(context, draft=False) as generation:
                seconds, _ = self._block(generation, n, 0.5)
                plain.append(1000 * seconds / n)
            for a, gamma in chosen.items():
                with self._open(context, draft=True, gamma=gamma or _FORCED) as generation:
                    seconds, tokens = self._block(generation, n, a)
                    rounds[a].append((1000 * seconds / n, tokens / n))
        del plain[0]
        yield Row("plain", "plain decoding", "ms/token", plain, "with its host sync")
        if limit := self.report.row("limit", context):
            share = [100 * limit.samples[0] / ms for ms in plain]
            yield Row("plain_share", "plain decoding, share of the limit", "%", share)
        for a, (_, *counted) in rounds.items():
            note = f"γ = {chosen[a] or _FORCED}"
            if chosen[a] == 0:
                note += ", though the schedule would draft nothing"
            each = [ms / tokens for ms, tokens in counted]
            speedups = [p / ms for p, ms in zip(plain, each, strict=True)]
            for key, label, unit, samples in (
                ("_round", "round", "ms", [ms for ms, _ in counted]),
                ("_tokens", "tokens a round", "", [tokens for _, tokens in counted]),
                ("", "RAPID", "ms/token", each),
                ("_speedup", "RAPID ÷ plain", "×", speedups),
            ):
                label = f"{label}, a = {a:g}"
                yield Row(f"rapid_{a:g}{key}", label, unit, samples, note, True)
        self._gamma = max(chosen.values()) or _FORCED

    def _host_calls(self, context: int) -> Iterator[Row]:
        """Numbers of kernel launches, graph replays and host synchronisations of a round."""
        gamma = self._gamma
        for name, draft in (("plain", False), ("RAPID", True)):
            with self._open(context, draft=draft, gamma=gamma) as generation:
                self._block(generation, 1, 0.5)
                calls = host_calls(partial(self._block, generation, 1, 0.5), self._device)
            note = f"γ = {gamma}" if draft else ""
            whats = "kernels launched", "graphs replayed", "host synchronisations"
            for (key, count), what in zip(calls.items(), whats, strict=True):
                yield Row(f"{name.lower()}_{key}", f"{what} a {name} round", "", [count], note)

    def _prefills(self, context: int) -> Iterator[Row]:
        """Prefills of our engine, then of transformers."""
        yield (ours := next(rows := self._prefill(context)))
        yield from rows
        self._decoder.clear_cache()
        ids = torch.tensor([self._tokens(context)], device=self._device)
        self._read_by_transformers(ids[:, : 2 * _DRAFT_TOKENS])
        held = self._allocated()
        theirs = self._read_by_transformers(ids)
        yield Row("prefill_transformers", "transformers' prefill", "s", [theirs], "in one pass")
        if self._on_gpu:
            more = (self._allocated(peak=True) - held - self._kv_bytes * context) / 1e9
            yield Row("prefill_transformers_memory", "its peak over weights + KV", "GB", [more])
        yield Row("prefill_ratio", "prefill ÷ transformers'", "", [ours.samples[0] / theirs])

    def _host_tier(self, context: int) -> Iterator[Row]:
        """Copies of KV to the host and back, and questions on a document in the host tier."""
        prefixes, runner = self._decoder._prefixes, self._decoder.target
        document = self._tokens(context)
        asked, _ = self._first_token(document, None)
        gb = self._kv_bytes * context / 1e9
        started = time.perf_counter()
        prefixes.free_devices()
        out = gb / (time.perf_counter() - started)
        yield Row("host_out", "KV to the host", "GB/s", [out], "with the pinning of its memory")
        back: list[float] = []
        seconds: list[float] = []
        for _ in range(3):
            started = time.perf_counter()
            with prefixes.lease(runner, document, runner.capacity_for(context + _ROOM)) as lease:
                back.append(lease.origins.get("host", 0) * self._kv_bytes / 1e9)
                back[-1] /= time.perf_counter() - started
            prefixes.free_devices()
            question = document[:-QUESTION] + self._tokens(QUESTION)
            seconds.append(self._first_token(question, None)[0])
            prefixes.free_devices()
        yield Row("host_back", "KV from the host", "GB/s", back)
        yield Row("host_question", "first token, next question, from the host", "s", seconds)
        shares = [100 * s / asked for s in seconds]
        yield Row("host_question_share", "÷ the first question's", "%", shares)

    def _generate(self, key: str, label: str, context: int, cache: Any) -> Iterator[Row]:
        """Milliseconds per token of transformers, and our speedup over it."""
        started = time.perf_counter()
        seconds = self._generated(cache, context)
        waited = time.perf_counter() - started - sum(seconds) * _GENERATED
        yield Row(key, label, "ms/token", [1000 * s for s in seconds], f"after {waited:.0f} s")
        peer = 1000 * median(seconds)
        names = {f"rapid_{a:g}": f"RAPID, times as fast, a = {a:g}" for a in self._acceptances}
        for ours, times in {"plain": "plain, times as fast", **names}.items():
            if row := self.report.row(ours, context):
                ratios = [peer / ms for ms in row.samples]
                yield Row(f"{ours}_to_{key}", times, "×", ratios, "", row.simulated)

    def _asked(self, context: int) -> Iterator[Row]:
        """Tokens a second of several questions at once, plainly and with simulated acceptance."""
        with self._open(context, draft=False):
            pass  # the document's KV, which is random, is kept
        document = self._tokens(context, context)[:-QUESTION]
        generations = self._decoder.generations
        sampling = replace(self._sampling, max_new_tokens=_ASKED)
        plain = [
            GenerationRequest(document + self._tokens(QUESTION), sampling=sampling)
            for _ in range(max(self._questions))
        ]
        # The same for all acceptances, so that the drafter reads its prompts once.
        drafted = [
            replace(one, draft_prompt=self._tokens(self._draft_tokens), speculation=_NO_LOOKUP)
            for one in plain
        ]
        speed = partial(tokens_per_second, self._decoder)
        coins = {f"RAPID, a = {a:g}": CoinFactory.of(generations, a) for a in self._acceptances}
        ways = {name: partial(speed, coin, drafted) for name, coin in coins.items()}
        ways = {"plain": partial(speed, generations, plain), **ways}
        yield from question_rows(self._questions, ways, self._turns(2), coins)

    # --- helpers -------------------------------------------------------------------------------

    def _drafter(self, runner: ModelRunner) -> RagDrafter:
        """A drafter without lookup, which finds nothing in random tokens."""
        prompt = self._tokens(self._draft_tokens, self._draft_tokens)
        session = Session(runner, runner.new_cache(self._draft_tokens + _ROOM))
        self._fill(session, prompt[:-1])
        sampler = Sampler(self._sampling, prompt, runner.device, runner.model)
        return RagDrafter(session, prompt, sampler, self._vocabulary, _NO_LOOKUP)

    def _block(self, generation: Any, rounds: int, a: float) -> tuple[float, int]:
        """Seconds and tokens of rounds with a simulated number n of accepted tokens.

        n follows P(n ≥ k) = aᵏ. Draws are stratified, so that their mean in a block is nearly
        exact.
        """
        draws = [(i + self._random.random()) / rounds for i in range(rounds)]
        self._random.shuffle(draws)
        generated = 0
        started = time.perf_counter()
        for draw in draws:
            before = generation.stats.drafted_tokens
            tokens = generation.round()
            drafted = generation.stats.drafted_tokens - before
            accepted = min(drafted, int(math.log(1 - draw) / math.log(a)))
            # Random tokens, because prompt lookup would find repeated ones.
            generation.keep([*tokens, *self._tokens(accepted)][: accepted + 1])
            generated += accepted + 1
        wait_for(self._device)
        return time.perf_counter() - started, generated

    @torch.inference_mode(False)
    @torch.no_grad()
    def _generated(self, make_cache: Callable[[], Cache], context: int) -> list[float]:
        """Seconds per token of transformers' ``generate`` after random KV, without the first run.

        It runs without gradients, as ``generate`` does itself, and not in inference mode, in which
        its compiled code may fail.
        """
        cache, (key, value) = make_cache(), self._random_kv(context)
        for layer in range(self._model.config.num_hidden_layers):
            cache.update(key, value, layer)
        seconds = []
        for run in range(_GENERATIONS):
            # Each run continues the previous one, whose last token was not read.
            ids = torch.tensor([self._tokens(context + run * _GENERATED + 1)], device=self._device)
            stamps = Stamps.of_generate(
                self._model, ids, _GENERATED, **{cache_argument(self._model.generate): cache}
            )
            seconds.append(stamps.per_token)
        return seconds[1:]

    def _read_by_transformers(self, ids: torch.Tensor) -> float:
        started = time.perf_counter()
        self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
        wait_for(self._device)
        return time.perf_counter() - started
