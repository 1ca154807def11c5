"""Acceptance under a schema on the quoting task: q masked (ours), q unmasked (as others do), free.

``python tests/masked_drafts.py`` prints the table for the packaged model. With an unmasked q drafts
are cut to the longest beginning that the grammar allows, and only the target is masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files

from rapid_llm import RapidDecoder, SamplingParams, SpeculationConfig
from rapid_llm.bench.workload import make_workload
from rapid_llm.engine.steps import Steps
from rapid_llm.speculation.drafters.base import Draft
from rapid_llm.speculation.drafters.rag import RagDrafter
from rapid_llm.stats import Stats

QUOTE = {
    "type": "object",
    "properties": {"quote": {"type": "string"}},
    "required": ["quote"],
    "additionalProperties": False,
}


@contextmanager
def unmasked_drafts() -> Iterator[None]:
    """The drafter does not know the constraint; the grammar cuts its drafts."""
    original = RagDrafter.drafting

    def drafting(
        self: RagDrafter, output: Sequence[int], gamma: int, *, look_ahead: bool
    ) -> Steps[Draft]:
        sampler, constraint = self._sampler, self._sampler.constraint
        sampler.constraint = None
        try:
            made = yield from original(self, output, gamma, look_ahead=look_ahead)
        finally:
            sampler.constraint = constraint
        legal = len(constraint.legal((), made.tokens.tolist()))
        whole = legal == len(made.tokens)
        q = made.probabilities if whole else made.probabilities[:legal]
        return Draft(made.tokens[:legal], q, made.passes)

    RagDrafter.drafting = drafting
    try:
        yield
    finally:
        RagDrafter.drafting = original


@dataclass(frozen=True)
class Row:
    """One way to draft: totals of its answers."""

    way: str
    stats: Stats

    def __str__(self) -> str:
        stats = self.stats
        return (
            f"{self.way:34} acceptance ratio {stats.acceptance_ratio:.3f}  rate "
            f"{stats.acceptance_rate:.3f}  tokens a round {stats.tokens_per_round:.2f}  drafted "
            f"{stats.drafted_tokens:4}  draft passes {stats.draft_passes:4}  mask "
            f"{1e6 * stats.mask_seconds / max(1, stats.completion_tokens):.0f} µs a token"
        )


def compare(decoder: RapidDecoder, context: int, seeds: range, **config: object) -> list[Row]:
    """Rows of the free answer, of a masked and of an unmasked q."""
    text = files("rapid_llm").joinpath("data/devils-dictionary.txt").read_text(encoding="utf-8")
    work = make_workload("quoting", context, text, decoder.tokenizer)
    speculation = SpeculationConfig(**config)

    def total(constraint: object) -> Stats:
        parts = [
            decoder.generate(
                work.target,
                work.draft,
                sampling=replace(sampling, seed=seed, constraint=constraint),
                speculation=speculation,
            ).stats
            for sampling in (SamplingParams(max_new_tokens=64, temperature=0.7),)
            for seed in seeds
        ]
        return Stats.together(parts)

    rows = [Row("no schema", total(None)), Row("schema, p and q masked", total(QUOTE))]
    with unmasked_drafts():
        rows.append(Row("schema, only p masked", total(QUOTE)))
    return rows


if __name__ == "__main__":
    packaged = RapidDecoder.from_pretrained("smollm2-135m", dtype="float32")
    for mode in ("exact", "paper"):
        for lookup in (False, True):
            print(f"mode {mode}, gamma 4, lookup {lookup}")
            for row in compare(packaged, 1024, range(6), mode=mode, gamma=4, lookup=lookup):
                print("  ", row, flush=True)
