"""What each rank of ``test_tensor_parallel.py`` runs; it writes what it saw to a JSON file.

Usage: ``ranks_worker.py PART FOLDER``, in the environment that ``torchrun`` makes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import string
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import tiny_tokenizer
from grammar_models import piece_tokenizer

from rapid_llm import RapidDecoder, SamplingParams, SpeculationConfig, tensor_parallel
from rapid_llm.batching import GenerationRequest
from rapid_llm.engine import costs
from rapid_llm.engine.costs import PassCost
from rapid_llm.engine.device import Device
from rapid_llm.engine.prefix_cache import prefixes
from rapid_llm.models import load_model

RANK = int(os.environ.get("RANK", "0"))
MODES = ("exact", "paper", "augmented")
PROMPT = [*range(3, 40), 5, 6, 7]  # lookup finds what followed 5, 6, 7
GREEDY = SamplingParams(max_new_tokens=16, ignore_eos=True)
FIRST = (PassCost(1.0, 0.02), PassCost(5.0, 4.0))
"""Costs that each rank measures: the second would draft nothing, or less."""

REQUESTS = [
    GenerationRequest(PROMPT, PROMPT[8:], sampling=GREEDY),
    GenerationRequest(PROMPT, sampling=SamplingParams(max_new_tokens=12, stop=["e", "7"])),
    GenerationRequest(
        [*PROMPT, 9],
        PROMPT[4:],
        sampling=SamplingParams(max_new_tokens=12, constraint=["abcd", "ab12"]),
        speculation=SpeculationConfig(mode="exact"),
    ),
    GenerationRequest(
        PROMPT[5:], PROMPT[8:], sampling=SamplingParams(max_new_tokens=9, temperature=1)
    ),
]


def decoder_of(
    model: Path, drafter: Path | None = None, device: str | None = None, **options: Any
) -> Any:
    """A decoder of models in folders, of which some types have tokenizers of their own."""
    loaded = [load_model(each, device=device).model for each in (model, drafter) if each]
    return RapidDecoder(loaded[0], tiny_tokenizer(), *loaded[1:], **options)


def of_letters(*models: Path, device: str | None = None) -> Any:
    """A decoder whose tokens are letters and digits, for constraints."""
    loaded = [load_model(each, device=device).model for each in models]
    pieces = string.ascii_letters + string.digits + "-"
    return RapidDecoder(loaded[0], piece_tokenizer(pieces), *loaded[1:])


def answers(decoder: Any) -> dict[str, Any]:
    """Tokens and counts of drafts in all modes, and tokens drawn with a seed and without."""
    seen: dict[str, Any] = {}
    for mode in MODES:
        config = SpeculationConfig(mode=mode)
        result = decoder.generate(PROMPT, PROMPT[8:], sampling=GREEDY, speculation=config)
        seen[mode] = [result.token_ids, result.stats.drafted_tokens, result.stats.rounds]
    for seed in (7, None):
        sampling = SamplingParams(max_new_tokens=8, ignore_eos=True, temperature=1.0, seed=seed)
        seen[f"seed {seed}"] = decoder.generate(PROMPT, PROMPT[8:], sampling=sampling).token_ids
    seen["likelihood"] = decoder.log_likelihood(PROMPT, "w4 w9")
    return seen


def architectures(folder: Path) -> dict[str, Any]:
    """Every architecture: both ranks answer alike."""
    seen = {}
    for path in sorted(folder.glob("model-*")):
        decoder = decoder_of(path)
        assert decoder.target.ranks is not None
        seen[path.name] = answers(decoder) | {
            "lean": decoder.target.lean,
            "kv_heads": decoder.target.config.num_key_value_heads,
        }
        with decoder._prefixes.lease(decoder.target, PROMPT, 64) as lease:
            seen[path.name]["held"] = [len(PROMPT) - 1, lease.reused]
            seen[path.name]["shares"] = decoder.target.kv_shares
            seen[path.name]["own_kv_heads"] = lease.cache.layers[0].keys.shape[1]
    pair = decoder_of(folder / "model-qwen3", folder / "model-llama")
    seen["pair"] = answers(pair)
    mixed = RapidDecoder(  # a drafter that every rank has whole
        pair.target.model,
        pair.tokenizer,
        load_model(folder / "model-llama", device="cpu:0").model,
    )
    seen["mixed"] = answers(mixed) | {"lean": mixed.drafter.lean}
    return seen


def endings(folder: Path) -> dict[str, Any]:
    """Calls that one rank ends; the last two cannot be gone on from."""
    decoder = decoder_of(folder / "model-llama")
    seen: dict[str, Any] = {}

    def attempt(name: str, call: Any) -> None:
        started = time.monotonic()
        try:
            call()
            outcome = "no error"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        after = None
        try:
            after = decoder.generate(PROMPT, sampling=GREEDY).token_ids
        except Exception as error:
            after = f"{type(error).__name__}: {error}"
        seen[name] = [outcome, after, time.monotonic() - started]

    def closed(by: int) -> None:
        stream = decoder.stream(PROMPT, sampling=GREEDY)
        for count, _ in enumerate(stream):
            if count == 3 and by == RANK:
                stream.close()
                return

    def failing(*_: Any) -> None:
        if RANK == 1:
            raise KeyError("progress")

    def in_a_pass() -> None:
        head = decoder.target.model.lm_head
        if RANK == 1:
            own, calls = head.forward, []

            def forward(*args: Any) -> Any:
                calls.append(1)
                if len(calls) > 4:
                    raise MemoryError("no memory")
                return own(*args)

            head.forward = forward
        decoder.generate(PROMPT, sampling=GREEDY)

    attempt("none", lambda: decoder.generate(PROMPT, sampling=GREEDY))
    attempt("closed on all", lambda: closed(RANK))
    attempt("closed on 1", lambda: closed(1))
    attempt("closed on 0", lambda: closed(0))
    attempt("failed", lambda: decoder.generate(PROMPT, sampling=GREEDY, progress=failing))
    attempt("another prompt", lambda: decoder.generate(PROMPT[RANK:], sampling=GREEDY))
    streams = [decoder.stream(PROMPT, sampling=GREEDY) for _ in range(2)]
    next(streams[0])
    attempt("two at a time", lambda: next(streams[1]))
    streams[0].close()
    attempt("in a pass", in_a_pass)
    time.sleep(tensor_parallel.PASS_SECONDS + 2 if RANK == 1 else 0)  # still there, but gone
    return seen


def death(die: Callable[[], Any], within: bool, folder: Path) -> dict[str, Any]:
    """Rank 1 dies between two passes, or within one."""
    decoder = decoder_of(folder / "model-llama")
    head = decoder.target.model.lm_head
    own, seen = head.forward, []
    if within and RANK == 1:
        head.forward = lambda *args: die() if len(seen) == 3 else own(*args)
    started = time.monotonic()
    try:
        for _ in decoder.stream(PROMPT, sampling=GREEDY):
            seen.append(1)
            if len(seen) == 3 and RANK == 1 and not within:
                die()
        outcome = "no error"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    return {"died": [outcome, time.monotonic() - started]}


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal may come a moment later


def unequal(folder: Path) -> dict[str, Any]:
    """Calls whose arguments differ between the ranks; a call after each works."""
    decoder = of_letters(folder / "model-qwen3", folder / "model-llama")
    seen: dict[str, Any] = {}

    def attempt(name: str, call: Callable[[], Any]) -> None:
        started = time.monotonic()
        try:
            outcome = repr(call())
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - started
        seen[name] = [outcome, decoder.generate(PROMPT, sampling=GREEDY).token_ids, seconds]

    def differing(name: str, *each: dict[str, Any]) -> None:
        options = each[RANK]
        of_sampling = options.pop("sampling", {})
        sampling = SamplingParams(**{"max_new_tokens": 8, "ignore_eos": True} | of_sampling)
        call = partial(decoder.generate, PROMPT, sampling=sampling, **options)
        attempt(name, lambda: call().token_ids)

    for name, values in {
        "constraint": (["ab1"], ["ab2"]),
        "stop": ([], ["-"]),
        "ignore_eos": (True, False),
        "top_k": (0, 5),
        "repetition_penalty": (None, 1.2),
        "timeout": (None, 1000),
        "max_new_tokens": (8, 9),
    }.items():
        differing(name, *({"sampling": {name: value}} for value in values))
    for name, values in {
        "speculation": (SpeculationConfig(), SpeculationConfig(gamma=3)),
        "confidence": (1.0, 0.5),
        "draft_prompt": (PROMPT[8:], PROMPT[9:]),
    }.items():
        differing(name, *({name: value} for value in values))
    differing("refused on 1", {}, {"confidence": 7})
    differing("refused on all", {"confidence": 7}, {"confidence": 7})
    attempt("refused score", lambda: decoder.log_likelihood(PROMPT, "a" if RANK == 0 else ""))
    score = partial(decoder.log_likelihood, PROMPT, "a9")
    attempt("which model scores", lambda: score(drafter=RANK == 1))
    other = of_letters(folder / "model-llama")

    def changed() -> Any:
        config = other.target.model.config
        config.attention_dropout = float(RANK)  # stands for any plain setting: an active adapter
        try:
            return other.generate(PROMPT, sampling=GREEDY)
        finally:
            config.attention_dropout = 0.0

    attempt("which model changed", changed)
    attempt("which decoder", lambda: (decoder, other)[RANK].generate(PROMPT, sampling=GREEDY))

    clock = time.perf_counter
    for late in (0, 1):  # the clock of one rank goes ahead after the first round
        limited = SamplingParams(max_new_tokens=8, timeout=500, ignore_eos=True)
        stream = decoder.stream(PROMPT, sampling=limited)
        first = next(stream).token_ids
        if late == RANK:
            time.perf_counter = lambda: clock() + 1000
        rest = (token for delta in stream for token in delta.token_ids)
        attempt(f"late on {late}", partial(list, chain(first, rest)))
        time.perf_counter = clock
    return seen


async def awaited(decoder: Any) -> list[int]:
    """Tokens of a stream for asyncio, after one that was closed."""
    stream = decoder.astream(PROMPT, sampling=GREEDY)
    await anext(stream)
    await stream.aclose()
    return [
        token
        async for delta in decoder.astream(PROMPT, sampling=GREEDY)
        for token in delta.token_ids
    ]


def many(folder: Path) -> dict[str, Any]:
    """Many requests at once, of which some end early, or fail on one rank."""
    decoder = of_letters(folder / "model-llama")

    def failing(*_: Any) -> None:
        if RANK == 1:
            raise KeyError("progress")

    seen: dict[str, Any] = {"many": [r.token_ids for r in decoder.generate_many(REQUESTS)]}
    stream = decoder.stream_many(REQUESTS)
    for _ in range(3):
        next(stream)
    stream.close()
    seen["after a closed stream"] = decoder.generate(PROMPT, sampling=GREEDY).token_ids
    for _ in range(3):  # a thread would be at another pass on each rank
        stream = decoder.scheduler.stream(PROMPT, sampling=GREEDY)
        next(stream)
        stream.close()
    seen["after a closed request"] = decoder.scheduler.generate(PROMPT, sampling=GREEDY).token_ids
    seen["for asyncio"] = asyncio.run(awaited(decoder.scheduler))
    wrong = GenerationRequest(PROMPT, sampling=GREEDY, progress=failing)
    outcomes = decoder.generate_many([REQUESTS[0], wrong, REQUESTS[0]], return_exceptions=True)
    seen["one fails"] = [getattr(each, "token_ids", repr(each)) for each in outcomes]
    seen["after an error"] = decoder.generate(PROMPT, sampling=GREEDY).token_ids
    return seen


def files(folder: Path) -> dict[str, Any]:
    """KV in files: what each rank reads of the folder."""
    Device.prefill_chunk, prefixes.WORTH_SAVING, prefixes.WORTH_LOADING = 10, 20, 10
    kept = folder / "kept"
    seen: dict[str, Any] = {}

    def ask(name: str, model: str = "model-llama") -> None:
        decoder = decoder_of(folder / model, kv_cache_dir=kept)  # nothing is in its memory
        result = decoder.generate(PROMPT, sampling=GREEDY)
        stats = result.stats
        dist.barrier()
        files = sorted(path.name for path in kept.glob("*.safetensors"))
        dist.barrier()
        seen[name] = [result.token_ids, stats.cached_tokens_disk, stats.cached_tokens, files]

    ask("first")
    ask("second")
    if RANK == 0:
        (kept / seen["second"][3][0]).unlink()
    ask("without a rank's")
    ask("with both again")
    ask("gathered", "model-phi3")
    ask("gathered again", "model-phi3")
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    tensor_parallel.PASS_SECONDS = 8
    costs.measure = lambda session: FIRST[RANK]
    os.environ["RAPID_LLM_CACHE"] = str(Path(sys.argv[2], f"cache-{RANK}"))
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "architectures": architectures,
        "endings": endings,
        "exit": partial(death, partial(os._exit, 0), False),
        "kill": partial(death, killed, False),
        "kill-in-a-pass": partial(death, killed, True),
        "unequal": unequal,
        "many": many,
        "files": files,
    }
    seen = parts[sys.argv[1]](Path(sys.argv[2]))
    Path(sys.argv[2], f"{sys.argv[1]}-{RANK}.json").write_text(json.dumps(seen))
    os._exit(0)  # a process group with a rank that is gone cannot be left in order
