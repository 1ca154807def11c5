"""CPU time of a constraint's masks a token, for the packaged vocabulary of 49,152 tokens.

``python tests/mask_time.py`` prints the table. Answers are read as rounds of speculation read them:
four drafted tokens, their masks and the next one's, then what was accepted, with a rejection in
every second round, after which other tokens are read. No model runs.

``python tests/mask_time.py answers`` measures in answers of the packaged model instead, whose
weights have passed through the caches before each mask: it takes several times as long there.

The time is the thread's own (``time.thread_time``), as other processes then count little.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from importlib.resources import files
from typing import Any

import torch
from conftest import smollm2

from rapid_llm import RapidDecoder, SamplingParams, SpeculationConfig
from rapid_llm.grammars import canonical
from rapid_llm.speculation import sampling
from rapid_llm.speculation.constraints import Constraints, Matcher

GAMMA = 4
WORDS = files("rapid_llm").joinpath("data/devils-dictionary.txt").read_text(encoding="utf-8")
ENTRY = {
    "type": "object",
    "properties": {
        "word": {"type": "string"},
        "part": {"enum": ["noun", "verb", "adjective"]},
        "year": {"type": "integer", "minimum": 1800, "maximum": 1999},
        "quotes": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
    },
    "required": ["word", "part", "year", "quotes"],
    "additionalProperties": False,
}
QUOTES = [WORDS[2_000:2_300], WORDS[5_000:5_200]]
RECORD = {"word": "PIANO", "part": "noun", "year": 1911, "quotes": QUOTES}
ANSWERS: dict[str, tuple[Any, str]] = {
    "a record of four fields": (ENTRY, json.dumps(RECORD)),
    "a list of 20 records": (
        {"type": "array", "items": ENTRY},
        json.dumps([{**RECORD, "quotes": [], "year": 1900 + i} for i in range(20)]),
    ),
    '{"quote": string}': (
        {"type": "object", "properties": {"quote": {"type": "string"}}, "required": ["quote"]},
        json.dumps({"quote": WORDS[1_000:2_500]}),
    ),
    '"json"': ("json", json.dumps({"entry": RECORD, "n": [1.5, -2, None, True]}, indent=1)),
    "a regular expression": (r"([A-Z][a-z]+ \d+[.,;] )+", "Alpha 12, Beta 7; Gamma 1984. " * 12),
    "a choice of 200": ([f"option {i}" for i in range(200)], "option 117"),
}


def masked_answer(constraints: Constraints, constraint: Any, text: str) -> tuple[int, float, float]:
    """Tokens of an answer, seconds of CPU time of all its masks, and of the longest round."""
    tokenizer = smollm2()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    other = tokenizer("e", add_special_tokens=False).input_ids[0]
    started = time.thread_time()
    matcher = constraints.matcher(
        canonical(constraint), len(tokenizer), {tokenizer.eos_token_id}, 0
    )
    longest, at, rounds = 0.0, 0, 0
    while at < len(ids):
        begun = time.thread_time()
        draft = ids[at : at + GAMMA]
        kept = len(draft)
        if rounds % 2 and kept > 1:  # the second drafted token is rejected
            kept -= 2
            wrong = [*draft[:kept], other]
            drafted = wrong if matcher.legal(draft[:kept], [other]) else draft
        else:
            drafted = draft
        for n in range(len(drafted)):
            matcher.mask(drafted[:n], 1)  # as the drafter asks, token by token
        matcher.mask(drafted, len(drafted) + 1)  # as the target does
        taken = ids[at : at + kept + 1]
        matcher.commit(taken)
        at, rounds = at + len(taken), rounds + 1
        longest = max(longest, time.thread_time() - begun)
    return len(ids), time.thread_time() - started, longest


def main() -> None:
    constraints = Constraints(smollm2())
    for constraint, _ in ANSWERS.values():  # compiled once for a decoder
        constraints.matcher(canonical(constraint), len(smollm2()), {2}, 0)
    total_tokens, total_seconds = 0, 0.0
    for name, (constraint, text) in ANSWERS.items():
        tokens, seconds, longest = masked_answer(constraints, constraint, text)
        total_tokens, total_seconds = total_tokens + tokens, total_seconds + seconds
        print(
            f"{name:26} {tokens:4} tokens  {1e6 * seconds / tokens:6.1f} µs a token  longest round "
            f"{1e6 * longest:6.0f} µs"
        )
    mean = 1e6 * total_seconds / total_tokens
    print(f"{'together':26} {total_tokens:4} tokens  {mean:6.1f} µs a token")


class Clock:
    """Seconds of CPU time of some functions; calls within their calls count once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def watch(self, owner: Any, name: str) -> None:
        """Count the time of a function or method from now on."""
        original: Callable[..., Any] = getattr(owner, name)

        @wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return original(*args, **kwargs)
            self._depth, started = 1, time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                self._depth = 0
                self.seconds += time.thread_time() - started

        setattr(owner, name, watched)


def in_answers(seeds: range = range(2), new: int = 64) -> None:
    torch.set_num_threads(1)
    decoder = RapidDecoder.from_pretrained("smollm2-135m", dtype="float32", device="cpu")
    read, masks, applied = Clock(), Clock(), Clock()
    read.watch(Matcher, "_reach")
    for name in ("mask", "over", "forced", "legal", "commit"):
        masks.watch(Matcher, name)
    applied.watch(sampling, "masked")
    retrieved, asked = WORDS[2_000:2_600], "\n\nDescribe a word of it in JSON."
    prompts = [{"role": "user", "content": WORDS[2_000:3_500] + asked}], retrieved + asked
    for way in (None, {"gamma": 4, "mode": "exact"}, {"gamma": 4, "mode": "paper"}):
        tokens = 0
        for clock in (read, masks, applied):
            clock.seconds = 0.0
        for constraint, _ in ANSWERS.values():
            for seed in seeds:
                options = SamplingParams(
                    max_new_tokens=new, temperature=0.7, seed=seed, constraint=constraint
                )
                result = decoder.generate(
                    *(prompts if way else prompts[:1]),
                    sampling=options,
                    speculation=SpeculationConfig(**way) if way else None,
                )
                tokens += result.stats.completion_tokens
        filling, matcher, masking = (1e6 * each.seconds / tokens for each in (read, masks, applied))
        print(
            f"{way or 'target alone'!s:34} {tokens:4} tokens  µs a token: reading tokens and "
            f"filling masks {filling:.1f}, with all other calls of the matcher {matcher:.1f}, "
            f"masking logits {masking:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    in_answers() if sys.argv[1:] == ["answers"] else main()
