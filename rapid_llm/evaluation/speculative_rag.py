"""Speculative RAG (Wang et al. 2024, arXiv 2407.08223): whole answers are drafted, one is chosen.

The retrieved chunks are clustered, and subsets with a chunk of each cluster are drawn. The drafter
answers from each subset, with a rationale. The target, which reads none of the chunks, judges each
draft by how likely it is itself (self-consistency) and how likely it says that the rationale
supports the answer (self-reflection). There the drafter was trained to write rationales; here it
is asked to. Drafts are written one after the other, where the paper runs them in parallel.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from sklearn.cluster import KMeans

from rapid_llm.config import SamplingParams
from rapid_llm.context.embedding import Vectors
from rapid_llm.decoder import RapidDecoder
from rapid_llm.encoding import encode_literal, encode_prompt
from rapid_llm.evaluation.tasks.base import Message
from rapid_llm.stats import Stats

DRAFTS = 5
CHUNKS_A_DRAFT = 2
RATIONALE_TOKENS = 128
INSTRUCTION = (
    "First write 'Rationale:' and, in a sentence or two, what in the text supports the answer. "
    "Then write 'Answer:' and the answer alone."
)
REFLECTION = "Do you think the explanation supports the answers? (Yes or No)"
"""The paper's own statement (its appendix C)."""

_ANSWER = re.compile(r"\banswer\W*:\W*", re.IGNORECASE)


@dataclass(frozen=True)
class Draft:
    """``rationale`` with the word that introduces the answer, empty where there was none."""

    rationale: str
    answer: str

    @classmethod
    def parse(cls, text: str) -> Draft:
        found = _ANSWER.search(text)
        if found is None or not text[found.end() :].strip():
            return cls("", text)
        return cls(text[: found.end()], text[found.end() :])


def draw_subsets(vectors: Vectors, seed: int) -> list[list[int]]:
    """At most ``DRAFTS`` different subsets of chunks, each in order: one chunk of every cluster.

    ``vectors``: ``[chunks, d]``.
    """
    clusters = min(CHUNKS_A_DRAFT, len(np.unique(vectors, axis=0)))
    labels = KMeans(clusters, n_init=10, random_state=seed).fit_predict(vectors)
    members = [np.flatnonzero(labels == label).tolist() for label in range(clusters)]
    rng = Random(seed)
    drawn = [tuple(sorted(rng.choice(some) for some in members)) for _ in range(DRAFTS)]
    return [list(subset) for subset in dict.fromkeys(drawn)]


def answer(
    decoder: RapidDecoder,
    render: Callable[[str], list[Message]],
    chunks: Sequence[str],
    vectors: Vectors,
    sampling: SamplingParams,
) -> tuple[str, Stats]:
    """The draft that scores best.

    Args:
        decoder: its drafter drafts, its target judges.
        render: the question's messages around a context.
        chunks: what was retrieved, at least one.
        vectors: theirs, ``[len(chunks), d]``.
        sampling: of an answer; a rationale may take ``RATIONALE_TOKENS`` more.

    Returns:
        The answer, without its rationale, and the seconds of all drafts and scores with the tokens
        of that draft.
    """
    longer = replace(sampling, max_new_tokens=sampling.max_new_tokens + RATIONALE_TOKENS)
    stats: list[Stats] = []
    drafts: list[Draft] = []
    scores: list[float] = []
    for subset in draw_subsets(vectors, sampling.seed or 0):
        prompt = _instructed(render("\n\n".join(chunks[i] for i in subset)))
        result = decoder.generate(None, prompt, sampling=longer)
        drafts.append(Draft.parse(result.text))
        started = time.perf_counter()
        scores.append(_confidence(decoder, prompt, render(""), drafts[-1]))
        result.stats.decode_seconds += time.perf_counter() - started
        stats.append(result.stats)
    best = max(range(len(scores)), key=scores.__getitem__)
    total = replace(Stats.together(stats), completion_tokens=stats[best].completion_tokens)
    return drafts[best].answer.strip(), total


def _confidence(
    decoder: RapidDecoder, prompt: list[Message], question: list[Message], draft: Draft
) -> float:
    """The logarithm of the paper's product of three probabilities (its section 3.3)."""
    text = draft.rationale + draft.answer
    if not text.strip():
        return float("-inf")
    reflection = [
        *question,
        {"role": "assistant", "content": text.strip()},
        {"role": "user", "content": REFLECTION},
    ]
    return (
        _drafting(decoder, prompt, draft)
        + decoder.log_likelihood(question, text)
        + decoder.log_likelihood(reflection, "Yes")
    )


def _drafting(decoder: RapidDecoder, prompt: list[Message], draft: Draft) -> float:
    """log (P(rationale | chunks) + P(answer | chunks, rationale)), by the drafter."""
    if not draft.rationale:
        return decoder.log_likelihood(prompt, draft.answer, drafter=True)
    tokenizer = decoder.tokenizer
    before = [*encode_prompt(prompt, tokenizer), *encode_literal(draft.rationale, tokenizer)]
    return float(
        np.logaddexp(
            decoder.log_likelihood(prompt, draft.rationale, drafter=True),
            decoder.log_likelihood(before, draft.answer, drafter=True),
        )
    )


def _instructed(messages: list[Message]) -> list[Message]:
    """The messages, the last of which also asks for a rationale."""
    *rest, last = messages
    return [*rest, last | {"content": f"{last['content']}\n\n{INSTRUCTION}"}]
