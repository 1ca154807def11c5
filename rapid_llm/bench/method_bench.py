"""Compare the speed of methods, their ablations and other libraries on the same prompts.

Runs are interleaved, so that a change in the machine's load affects all methods. The first run of
each warms up and is not counted. In it, other libraries read the short prompt of the drafter,
because their later runs reuse nothing, and a long prompt takes minutes on a CPU.
"""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from math import inf
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from rapid_llm.batching import GenerationRequest
from rapid_llm.bench.base import Bench, Step
from rapid_llm.bench.questions import peer_tokens_per_second, question_rows, tokens_per_second
from rapid_llm.bench.report import Row
from rapid_llm.bench.timing import Stamps
from rapid_llm.bench.workload import Workload
from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.device import device_of
from rapid_llm.errors import ContextWindowError
from rapid_llm.stats import Stats

ROOM = 32
"""Minimum tokens of an answer, more than the longest pass that is timed."""

_GENERATE = "transformers generate"
_GENERATE_WIDE = f"{_GENERATE}, float32"
_LOOKUP, _ASSISTED = "transformers prompt lookup", "transformers assisted"
_BATCH = "transformers generate_batch"
_LLAMA_CPP = "llama.cpp, 4 bit"
# By name: whether the drafter's copy is quantized, and options of the speculation.
_VARIANTS: dict[str, tuple[bool, dict[str, Any]]] = {
    "rapid": (True, {}),
    "rapid γ=10, as published": (False, {"gamma": 10, "lookup": False}),
    "rapid without quantization": (False, {}),
    "rapid without lookup": (True, {"lookup": False}),
    "rapid without quantization, lookup": (False, {"lookup": False}),
    "rapid without adaptive γ (4)": (True, {"gamma": 4}),
    **{name: (True, {"drafting": name}) for name in ("streaming", "triforce", "rest")},
}


def _rows_of(variant: str) -> dict[str, dict[str, Any]]:
    """Rows of a variant with their modes: with η = 0, and, but for rest, with the default η."""
    exact = {"rapid": "sd", "rest": "rest"}.get(variant, f"{variant}, η=0")
    return {exact: {"mode": "exact"}} | ({} if variant == exact else {variant: {}})


_ROWS = {
    row: (quantized, SpeculationConfig(**mode, **options))
    for variant, (quantized, options) in _VARIANTS.items()
    for row, mode in _rows_of(variant).items()
}
NAMES = "lc", "rag", *_ROWS, _GENERATE, _LOOKUP, _ASSISTED, _GENERATE_WIDE, _LLAMA_CPP
"""Names of all methods that there may be on any machine."""

_COLUMNS = (
    "medians of interleaved greedy runs (range); a acceptance rate, E tokens a round, γ tokens "
    "drafted, c a drafter's pass and v a verification ÷ a plain step"
)


class Run(NamedTuple):
    """Result of one generation."""

    prefill: float | None  # seconds of reading the prompts; None where they were read before
    per_token: float  # seconds per token after that
    stats: Stats | None = None  # statistics of our decoder; None for other libraries


Method = Callable[[Workload, int], Run]
"""Function of a workload and the number of tokens to decode; end-of-sequence tokens are ignored."""


def our_methods(decoder: RapidDecoder) -> dict[str, Method]:
    """Methods of our decoder; each speculative one with η = 0 (``exact``) and the default η."""
    model, name = decoder.target.model, decoder.target.name
    own = RapidDecoder(model, decoder.tokenizer, name=name, drafter_quantization=None)
    return {
        "lc": _ours(decoder, None),
        "rag": _ours(decoder, None, rag=True),
        **{row: _ours(decoder if few else own, config) for row, (few, config) in _ROWS.items()},
    }


def peer_methods(decoder: RapidDecoder, gguf: Path | None = None) -> dict[str, Method]:
    """Methods of transformers, and of llama.cpp where it is installed and a GGUF file is given.

    In assisted generation the target is its own assistant, as in our self-speculation. On a CPU
    without fast products in the model's dtype, transformers is also measured in float32, where it
    is faster.
    """
    model = decoder.target.model
    rows = {
        _GENERATE: _generate(lambda: model),
        _LOOKUP: _generate(lambda: model, prompt_lookup_num_tokens=10),
        _ASSISTED: _generate(lambda: model, assistant_model=model),
    }
    if device_of(model.device).product_dtype(model.dtype) != model.dtype:
        wide = cache(lambda: copy.deepcopy(model).float())  # made at the first run
        rows[_GENERATE_WIDE] = _generate(wide)
    if gguf is not None and importlib.util.find_spec("llama_cpp") is not None:
        rows[_LLAMA_CPP] = _llama_cpp(gguf, decoder.target.context_window)
    return rows


def _ours(
    decoder: RapidDecoder, speculation: SpeculationConfig | None, *, rag: bool = False
) -> Method:
    def run(work: Workload, new_tokens: int) -> Run:
        stats = decoder.generate(
            None if rag else work.target,
            work.draft if rag or speculation is not None else None,
            sampling=SamplingParams(max_new_tokens=new_tokens, ignore_eos=True),
            speculation=speculation,
        ).stats
        cold = stats.prefill_seconds if stats.cached_tokens == 0 else None
        return Run(cold, stats.decode_seconds / stats.completion_tokens, stats)

    return run


def _generate(model: Callable[[], PreTrainedModel], **options: Any) -> Method:
    """transformers' ``generate`` with its default attention and cache."""

    @torch.inference_mode()
    def run(work: Workload, new_tokens: int) -> Run:
        ids = torch.tensor([work.target], device=model().device)
        stamps = Stamps.of_generate(model(), ids, new_tokens, **options)
        return Run(stamps.prefill, stamps.per_token)

    return run


def _llama_cpp(path: Path, window: int) -> Method:
    """llama.cpp with as many threads as torch."""

    @cache
    def load() -> Any:
        from llama_cpp import Llama  # an optional peer

        n = torch.get_num_threads()
        return Llama(str(path), n_ctx=window, n_threads=n, n_threads_batch=n, verbose=False)

    def run(work: Workload, new_tokens: int) -> Run:
        load().reset()
        started = time.perf_counter()
        stream = load().generate(work.target, temp=0.0, reset=False)
        next(stream)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            next(stream)
        return Run(first - started, (time.perf_counter() - first) / (new_tokens - 1))

    return run


class MethodBench(Bench):
    """Measures methods of our decoder, and peers of other libraries, on workloads; and the engine.

    A run decodes ``new_tokens``, at least 2, and counts ``repeats`` times. Each number of
    ``questions`` is asked at once as well, the same question each time.

    Raises:
        ContextWindowError: a prompt and the new tokens exceed the model's window.
    """

    def __init__(
        self,
        decoder: RapidDecoder,
        methods: Mapping[str, Method],
        works: Sequence[Workload],
        *,
        peers: Mapping[str, Method] | None = None,
        new_tokens: int,
        repeats: int,
        questions: Sequence[int] = (),
    ) -> None:
        window, longest = decoder.target.context_window, max(len(work.target) for work in works)
        if longest + new_tokens > window:
            raise ContextWindowError(
                f"a prompt of {longest} tokens and {new_tokens} new ones need "
                f"{longest + new_tokens}, the context window of {decoder.target.name} has "
                f"{window}: take a shorter context"
            )
        self._peers, self._works = peers or {}, works
        self._methods = {**methods, **self._peers}
        self._new_tokens, self._repeats, self._questions = new_tokens, repeats, questions
        facts = {"model": decoder.target.name, "new_tokens": new_tokens, "repeats": repeats}
        facts["columns"] = _COLUMNS
        draft_tokens = max(len(work.draft) for work in works)
        room = max(new_tokens, ROOM)
        super().__init__(decoder, facts, room=room, draft_tokens=draft_tokens, seconds=inf)

    def steps(self) -> Iterator[Step]:
        yield Step("memory", None, inf, self._memory)
        for work in self._works:
            yield Step(work.task, work.context, inf, partial(self._compared, work))
            if self._questions:
                name = f"{work.task}, questions at once"
                yield Step(name, work.context, inf, partial(self._asked, work))
        for context in dict.fromkeys(work.context for work in self._works):
            yield Step("passes", context, inf, partial(self._passes, context))
            yield Step("prefill", context, inf, partial(self._prefill, context))

    def _compared(self, work: Workload) -> Iterator[Row]:
        """A row of tokens/s per method; ratios are those of medians."""
        total, done = len(self._methods) * (self._repeats + 1), 0
        runs: dict[str, list[Run]] = {name: [] for name in self._methods}
        short = replace(work, target=work.draft)
        for turn in range(self._repeats + 1):
            self._decoder.clear_cache()  # so that each turn reads the prompt once more
            for name, method in self._methods.items():
                self.progress(f"{work.task}, {work.context:,} tokens: runs", done, total)
                warming = turn == 0 and name in self._peers
                runs[name].append(method(short if warming else work, self._new_tokens))
                done += 1
        speeds = {name: [1 / run.per_token for run in some[1:]] for name, some in runs.items()}
        for name, (_, *counted) in runs.items():
            columns = {
                heading: median(speeds[name]) / median(speeds[other])
                for heading, other in (("÷ lc", "lc"), ("÷ generate", _GENERATE))
                if other in speeds
            }
            if (stats := counted[-1].stats) and stats.drafted_tokens and "lc" in speeds:
                columns |= _speculation(stats, 1 / median(speeds["lc"]))
            if read := [run.prefill for run in counted if run.prefill is not None]:
                columns["prefill, s"] = median(read)
            yield Row(name, name, "tokens/s", speeds[name], columns=columns)

    def _asked(self, work: Workload) -> Iterator[Row]:
        """Tokens a second of several questions at once: plainly, by RAPID, and transformers'."""
        sampling = SamplingParams(max_new_tokens=self._new_tokens, ignore_eos=True)
        self._decoder.generate(work.target, sampling=replace(sampling, max_new_tokens=1))
        ways = {}
        for name, draft in (("lc", None), ("rapid", work.draft)):
            request = GenerationRequest(work.target, draft, sampling=sampling)
            asked = [request] * max(self._questions)
            ways[name] = partial(tokens_per_second, self._decoder, self._decoder.generations, asked)
        yield from question_rows(self._questions, ways, self._turns(self._repeats))
        self._decoder.clear_cache()  # the peer fills the memory that is free
        peer = partial(peer_tokens_per_second, self._model, work.target, self._new_tokens)
        try:
            yield from question_rows(self._questions, {_BATCH: peer}, self._turns(self._repeats))
        except Exception as error:  # of a library whose continuous batching is new
            why = f"does not run here ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
            yield Row(f"questions_{_BATCH}", _BATCH, "tokens/s", [], why)


def _speculation(stats: Stats, plain: float) -> dict[str, float]:
    """Acceptance, tokens per round and costs, from stats and the seconds of a plain step."""
    checking = (stats.decode_seconds - stats.draft_seconds) / stats.rounds
    costs = {"a": stats.acceptance_rate, "E": stats.tokens_per_round, "v": checking / plain}
    if stats.draft_passes:  # else no model drafted
        costs["c"] = stats.draft_seconds / stats.draft_passes / plain
    return costs | {"γ": stats.drafted_tokens / stats.rounds}
