"""The tasks: where their items come from, how they are asked and how answers are scored."""

from __future__ import annotations

from pathlib import Path

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.errors import InvalidParameterError
from rapid_llm.evaluation.judge import Judge
from rapid_llm.evaluation.tasks import infinitebench, longbench, mtbench101, needle, nq, squad
from rapid_llm.evaluation.tasks.base import Task

TASKS = {
    "infinitebench-qa": "∞Bench En.QA: questions on a book (F1)",
    "infinitebench-mc": "∞Bench En.MC: questions on a book with four options (accuracy)",
    "infinitebench-sum": "∞Bench En.Sum: the summary of a book (ROUGE-L-Sum)",
    "infinitebench-passkey": "∞Bench PassKey: a key hidden in noise (accuracy)",
    "infinitebench-number": "∞Bench Number: a long number hidden in noise (accuracy)",
    "infinitebench-kv": "∞Bench KV: the value of a key in a large JSON object (accuracy)",
    "longbench-v2": "LongBench v2: questions with four choices, answered at once (accuracy)",
    "longbench-v2-cot": "LongBench v2, answered after thinking step by step (accuracy)",
    "needle": "invented facts hidden in prose; needs no data (answer contained)",
    "squad": "a SQuAD file's questions, its paragraphs joined (answer contained, EM, F1)",
    "nq": "Natural Questions of Lost in the Middle, passages joined (answer contained, EM, F1)",
    "mtbench101": "MT-Bench-101 over a long chat history (judge's rating, ROUGE-L)",
}
CONTEXT_TOKENS = {"needle": 6000, "squad": 1700, "nq": 6500, "mtbench101": 6000}
"""Where a context is made to a length: the length in tokens if none is given."""


def load_task(
    name: str,
    data: Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    context_tokens: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    judge: Judge | None = None,
) -> Task:
    """A task with its items; the first of them do not depend on ``limit``.

    Args:
        name: one of :data:`TASKS`.
        data: the benchmark's file, or the folder with it; None downloads it from the hub where
            the benchmark has it there (∞Bench, LongBench v2). ``needle`` takes any text.
        tokenizer: the target's fast tokenizer.
        context_tokens: length of the contexts in tokens; None takes :data:`CONTEXT_TOKENS`. The
            other tasks ignore it: their contexts are as long as they are.
        limit: number of items; None takes all (of ``needle``, 100).
        seed: of what is drawn at random.
        judge: rates the answers of ``mtbench101``; the other tasks ignore it.

    Raises:
        InvalidParameterError: the task is unknown, or a number is outside its range.
        DataError: the data is missing, lacks a field, or cannot be downloaded.
        DocumentError: the text for ``needle`` cannot be read.
    """
    if name not in TASKS:
        raise InvalidParameterError(f"task={name!r} is unknown; choose one of {', '.join(TASKS)}")
    for parameter, value in (("context_tokens", context_tokens), ("limit", limit)):
        if value is not None and value < 1:
            raise InvalidParameterError(
                f"{parameter}={value} is not allowed: {parameter} must be at least 1"
            )
    tokens = context_tokens or CONTEXT_TOKENS.get(name, 0)
    benchmark, _, part = name.partition("-")
    match benchmark:
        case "infinitebench":
            return infinitebench.load(part, data, limit)
        case "longbench":
            return longbench.load(name, data, limit)
        case "needle":
            return needle.load(data, tokenizer, tokens, limit, seed)
        case "squad":
            return squad.load(data, tokenizer, tokens, limit, seed)
        case "nq":
            return nq.load(data, tokenizer, tokens, limit, seed)
        case _:
            return mtbench101.load(data, tokenizer, tokens, limit, seed, judge)
