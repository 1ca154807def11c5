"""Questions of a file in SQuAD's format (Rajpurkar et al. 2016), on paragraphs joined to a length.

The paragraph with the answer stands at a random place among others of the same file. Scores are
those of the SQuAD v1.1 script, and whether the answer holds a reference.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.context.prompts import build_messages
from rapid_llm.evaluation.scoring import contains, exact_match, token_f1
from rapid_llm.evaluation.tasks.base import (
    CONTEXT,
    SHORT_ANSWER,
    Benchmark,
    Item,
    MetricKind,
)
from rapid_llm.evaluation.tasks.data import Row, locate, read_object
from rapid_llm.evaluation.tasks.passages import BETWEEN, Filled, Passages

METRICS: dict[str, MetricKind] = {"contains": "rate", "exact_match": "rate", "f1": "mean"}


def load(
    data: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    context_tokens: int,
    limit: int | None,
    seed: int,
) -> Benchmark:
    """``limit`` random questions of the file; those of SQuAD 2.0 without an answer are left out.

    Raises:
        DataError: the file is missing, lacks a field, or is too short for ``context_tokens``.
        InvalidParameterError: ``context_tokens`` is too short for a paragraph.
    """
    path = locate(data, "a file in SQuAD's format")
    articles = read_object(path).rows("data")
    paragraphs = [paragraph for article in articles for paragraph in article.rows("paragraphs")]
    texts = [paragraph.text("context").strip() for paragraph in paragraphs]
    passages = Passages(str(path), texts, tokenizer)
    questions = [
        (gold, question)
        for gold, paragraph in enumerate(paragraphs)
        for question in paragraph.rows("qas")
        if not question.fields.get("is_impossible", False)
    ]
    # A file goes from paragraph to paragraph, and the first questions would be on a few of them.
    Random(seed).shuffle(questions)
    items = []
    for gold, row in questions[:limit]:
        rng = Random(f"{seed}/{row.text('id')}")
        items.append(_item(row, passages.fill([texts[gold]], context_tokens, rng, {gold})))
    return Benchmark("squad", METRICS, items, score)


def _item(row: Row, filled: Filled) -> Item:
    question = row.text("question").strip()
    answers = [answer.text("text") for answer in row.rows("answers")]
    if not answers:
        raise row.wrong("answers", "is empty")
    return Item(
        id=row.text("id"),
        context=BETWEEN.join(filled.texts),
        query=question,
        messages=tuple(build_messages(CONTEXT, question, instruction=SHORT_ANSWER)),
        references=tuple(dict.fromkeys(answers)),
        max_new_tokens=32,
        groups={"depth": filled.depth},
    )


def score(item: Item, answer: str) -> dict[str, float]:
    """What :data:`METRICS` names."""
    return {
        "contains": contains(answer, item.references),
        "exact_match": exact_match(answer, item.references),
        "f1": token_f1(answer, item.references),
    }
