"""MT-Bench-101 (Bai et al. 2024, arXiv 2402.14762) over a long chat history.

As RAPID's paper makes it (section 4.4): of each dialogue the last message is asked, and the turns
before it are strewn over a long history of other dialogues. The paper has 122K tokens of history
and the first 100 dialogues, rated by GPT-4. A local file is the benchmark's ``mtbench101.jsonl``.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.evaluation.judge import Judge
from rapid_llm.evaluation.scoring import rouge_l
from rapid_llm.evaluation.tasks.base import CONTEXT, Benchmark, Item, Message, MetricKind
from rapid_llm.evaluation.tasks.data import Row, locate, read_rows
from rapid_llm.evaluation.tasks.passages import BETWEEN, Filled, Passages

# Mathematics and reasoning have one right answer: the benchmark shows the judge the reference.
JUDGED_BY_REFERENCE = ("MR", "GR")
OPENING = (
    "Below is the history of our chats, turn by turn. Somewhere in it are the earlier turns of the "
    "conversation that my last message continues."
)
CLOSING = "My last message, which you are to answer:"


def load(
    data: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    context_tokens: int,
    limit: int | None,
    seed: int,
    judge: Judge | None,
) -> Benchmark:
    """The first ``limit`` dialogues of the file.

    The metrics are the judge's ``rating`` (a tenth of 1 to 10), if there is one, and the overlap
    with the reference answer.

    Raises:
        DataError: the file is missing, lacks a field, or is too short for ``context_tokens``.
        InvalidParameterError: ``context_tokens`` is too short for a dialogue.
    """
    path = locate(data, "mtbench101.jsonl")
    rows = list(read_rows(path))
    dialogues = [_turns(row) for row in rows]
    passages = Passages(
        str(path), [BETWEEN.join(map(_said, turns)) for turns in dialogues], tokenizer
    )
    items = []
    conversations: dict[str, list[Message]] = {}
    for number, (row, turns) in enumerate(zip(rows[:limit], dialogues, strict=False)):
        earlier = [_said(turn) for turn in turns[:-1]]
        filled = passages.fill(earlier, context_tokens, Random(f"{seed}/{number}"), {number})
        item = _item(number, row, turns[-1], filled)
        conversations[item.id] = _messages(turns)
        items.append(item)

    def score(item: Item, answer: str) -> dict[str, float]:
        scores = {"rouge_l": rouge_l(answer, item.references)}
        if judge is None:
            return scores
        reference = item.references[0] if item.groups["task"] in JUDGED_BY_REFERENCE else None
        return {"rating": judge.rate(conversations[item.id], answer, reference) / 10} | scores

    metrics: dict[str, MetricKind] = {"rating": "mean"} if judge else {}
    return Benchmark("mtbench101", metrics | {"rouge_l": "mean"}, items, score)


def _turns(row: Row) -> list[Row]:
    turns = row.rows("history")
    if not turns:
        raise row.wrong("history", "is empty")
    return turns


def _said(turn: Row) -> str:
    return f"User: {turn.text('user')}\n\nAssistant: {turn.text('bot')}"


def _messages(turns: list[Row]) -> list[Message]:
    """The conversation up to the last message, without the reference answer to it."""
    said = [
        {"role": role, "content": turn.text(field)}
        for turn in turns
        for role, field in (("user", "user"), ("assistant", "bot"))
    ]
    return said[:-1]


def _item(number: int, row: Row, last: Row, filled: Filled) -> Item:
    query = last.text("user")
    content = f"{OPENING}\n\n{CONTEXT}\n\n{CLOSING}\n\n{query}"
    return Item(
        id=str(number + 1),
        context=BETWEEN.join(filled.texts),
        query=query,
        messages=({"role": "user", "content": content},),
        references=(last.text("bot"),),
        max_new_tokens=1024,
        groups={"task": row.text("task")},
    )
