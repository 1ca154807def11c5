"""What each rank of ``test_tensor_parallel.py`` runs; it writes what it saw to a JSON file.

Usage: ``ranks_worker.py PART FOLDER``, in the environment that ``torchrun`` makes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_tokenizer

from rapid_llm import RapidDecoder, SamplingParams, SpeculationConfig, tensor_parallel
from rapid_llm.engine import costs
from rapid_llm.engine.costs import PassCost
from rapid_llm.models import load_model

RANK = int(os.environ.get("RANK", "0"))
MODES = ("exact", "paper", "augmented")
PROMPT = [*range(3, 40), 5, 6, 7]  # lookup finds what followed 5, 6, 7
GREEDY = SamplingParams(max_new_tokens=16, ignore_eos=True)
FIRST = (PassCost(1.0, 0.02), PassCost(5.0, 4.0))
"""Costs that each rank measures: the second would draft nothing, or less."""


def decoder_of(model: Path, drafter: Path | None = None, device: str | None = None) -> Any:
    """A decoder of models in folders, of which some types have tokenizers of their own."""
    loaded = [load_model(each, device=device).model for each in (model, drafter) if each]
    return RapidDecoder(loaded[0], tiny_tokenizer(), *loaded[1:])


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


def death(folder: Path) -> dict[str, Any]:
    """Rank 1 dies between two passes."""
    decoder = decoder_of(folder / "model-llama")
    started = time.monotonic()
    try:
        for count, _ in enumerate(decoder.stream(PROMPT, sampling=GREEDY)):
            if count == 3 and RANK == 1:
                os._exit(0)
        outcome = "no error"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    return {"died": [outcome, time.monotonic() - started]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    tensor_parallel.PASS_SECONDS = 8
    costs.measure = lambda session: FIRST[RANK]
    os.environ["RAPID_LLM_CACHE"] = str(Path(sys.argv[2], f"cache-{RANK}"))
    seen = {"architectures": architectures, "endings": endings, "death": death}[sys.argv[1]](
        Path(sys.argv[2])
    )
    Path(sys.argv[2], f"{sys.argv[1]}-{RANK}.json").write_text(json.dumps(seen))
    os._exit(0)  # a process group with a rank that is gone cannot be left in order
