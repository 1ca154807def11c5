"""Natural Questions of Lost in the Middle (Liu et al. 2023, arXiv 2307.03172).

The passage with the answer stands at a random place among passages of other questions. The prompt
and the score (``best_subspan_em``, here ``contains``, of the answer's first line) are those of its
repository, nelson-liu/lost-in-the-middle; a local file is its ``nq-open-oracle.jsonl.gz``.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.evaluation.scoring import normalise
from rapid_llm.evaluation.tasks import squad
from rapid_llm.evaluation.tasks.base import CONTEXT, Benchmark, Item
from rapid_llm.evaluation.tasks.data import Row, locate, read_rows
from rapid_llm.evaluation.tasks.passages import Filled, Passages

PROMPT = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant)."
)


def load(
    data: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    context_tokens: int,
    limit: int | None,
    seed: int,
) -> Benchmark:
    """The first ``limit`` questions of the file.

    Raises:
        DataError: the file is missing, lacks a field, or is too short for ``context_tokens``.
        InvalidParameterError: ``context_tokens`` is too short for a passage.
    """
    path = locate(data, "nq-open-oracle.jsonl.gz")
    rows = list(read_rows(path))
    texts = [_gold(row) for row in rows]
    passages = Passages(str(path), texts, tokenizer)
    plain = [normalise(text) for text in texts]
    items = []
    for number, row in enumerate(rows[:limit]):
        answers = [normalise(answer) for answer in row.texts("answers")]
        telling = {i for i, text in enumerate(plain) if any(answer in text for answer in answers)}
        rng = Random(f"{seed}/{number}")
        filled = passages.fill([texts[number]], context_tokens, rng, telling | {number})
        items.append(_item(number, row, filled))
    return Benchmark("nq", squad.METRICS, items, _score)


def _gold(row: Row) -> str:
    """The passage with the answer, as the benchmark writes it but for its number."""
    passages = row.rows("ctxs")
    gold = [p for p in passages if p.fields.get("isgold", len(passages) == 1)]
    if not gold:
        raise row.wrong("ctxs", "has no passage with isgold")
    return f"Document [{{}}](Title: {gold[0].text('title')}) {gold[0].text('text')}"


def _item(number: int, row: Row, filled: Filled) -> Item:
    question = row.text("question")
    content = f"{PROMPT}\n\n{CONTEXT}\n\nQuestion: {question}\nAnswer:"
    documents = [text.replace("{}", str(i), 1) for i, text in enumerate(filled.texts, 1)]
    return Item(
        id=str(number + 1),
        context="\n".join(documents),
        query=question,
        messages=({"role": "user", "content": content},),
        references=row.texts("answers"),
        max_new_tokens=100,
        groups={"depth": filled.depth},
    )


def _score(item: Item, answer: str) -> dict[str, float]:
    # Only the first line: a model that copies its text would otherwise hold every answer.
    return squad.score(item, answer.split("\n")[0])
