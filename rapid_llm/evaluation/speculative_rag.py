"""Speculative RAG (Wang et al. 2024, arXiv 2407.08223): draft whole answers and choose one.

The retrieved chunks are clustered, and subsets with a chunk of each cluster are drawn. The drafter
answers from each subset, with a rationale. The target, which reads no chunks, scores each draft by
its probability (self-consistency) and by the probability of saying that the rationale supports the
answer (self-reflection). The paper trains the drafter to write rationales, here it is prompted; the
paper writes drafts in parallel, here they are written one after another.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
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
REFLECTION = "Do you think the explanation supports the answers? (Yes or No)"  # its appendix C


def split(text: str) -> tuple[str, str]:
    """A draft's rationale, up to the word "answer" (without it: empty), and its answer."""
    found = re.search(r"\banswer\W*:\W*", text, re.IGNORECASE)
    if found is None or not text[found.end() :].strip():
        return "", text
    return text[: found.end()], text[found.end() :]


def draw_subsets(vectors: Vectors, seed: int) -> list[list[int]]:
    """At most ``DRAFTS`` different subsets of chunks, with one chunk of every cluster each.

    ``vectors`` are those of the chunks, ``[chunks, d]``; a subset is ascending indices.
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
    """The answer of the best draft, and stats with the seconds of all drafts and scores.

    ``render`` makes the messages of the question from a context, of retrieved ``chunks`` with their
    ``vectors``, ``[len(chunks), d]``. A draft may be ``RATIONALE_TOKENS`` longer than an answer.
    """
    longer = replace(sampling, max_new_tokens=sampling.max_new_tokens + RATIONALE_TOKENS)
    drafts: list[tuple[float, str, Stats]] = []
    for subset in draw_subsets(vectors, sampling.seed or 0):
        *rest, last = render("\n\n".join(chunks[i] for i in subset))
        prompt = [*rest, last | {"content": f"{last['content']}\n\n{INSTRUCTION}"}]
        result = decoder.generate(None, prompt, sampling=longer)
        rationale, said = split(result.text)
        started = time.perf_counter()
        score = _confidence(decoder, prompt, render(""), rationale, said)
        result.stats.decode_seconds += time.perf_counter() - started
        drafts.append((score, said.strip(), result.stats))
    _, best, stats = max(drafts, key=lambda draft: draft[0])
    total = Stats.together([each for _, _, each in drafts])
    return best, replace(total, completion_tokens=stats.completion_tokens)


def _confidence(
    decoder: RapidDecoder, prompt: list[Message], question: list[Message], *draft: str
) -> float:
    """Logarithm of the product of three probabilities in section 3.3 of the paper."""
    text = "".join(draft)
    if not text.strip():
        return -np.inf
    answered = {"role": "assistant", "content": text.strip()}
    reflection = [*question, answered, {"role": "user", "content": REFLECTION}]
    itself = decoder.log_likelihood(question, text) + decoder.log_likelihood(reflection, "Yes")
    return drafting(decoder, prompt, *draft) + itself


def drafting(decoder: RapidDecoder, prompt: list[Message], rationale: str, said: str) -> float:
    """log (P(rationale | chunks) + P(answer | chunks, rationale)), by the drafter."""
    if not rationale:
        return decoder.log_likelihood(prompt, said, drafter=True)
    tokenizer = decoder.tokenizer
    before = [*encode_prompt(prompt, tokenizer), *encode_literal(rationale, tokenizer)]
    first = decoder.log_likelihood(prompt, rationale, drafter=True)
    return float(np.logaddexp(first, decoder.log_likelihood(before, said, drafter=True)))
