"""MT-Bench-101 (Bai et al. 2024, arXiv 2402.14762) over a long chat history.

As in RAPID's paper (section 4.4), the question is the last message of a dialogue, whose earlier
turns are scattered over a long history of other dialogues. The paper has 122K tokens of history
and the first 100 dialogues, rated by GPT-4. A local file is the benchmark's ``mtbench101.jsonl``.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from rapid_llm.context.retrieved import SEPARATOR
from rapid_llm.evaluation.scoring import rouge
from rapid_llm.evaluation.tasks.base import CONTEXT, Item, Message, MetricKind, Source, Task
from rapid_llm.evaluation.tasks.data import Text, locate, read_rows
from rapid_llm.evaluation.tasks.passages import Passages

# Mathematics and reasoning have one right answer, so the benchmark shows the judge the reference.
JUDGED_BY_REFERENCE = ("MR", "GR")
PROMPT = (
    "Below is the history of our chats, turn by turn. Somewhere in it are the earlier turns of the "
    f"conversation that my last message continues.\n\n{CONTEXT}\n\n"
    "My last message, which you are to answer:\n\n"
)


class _Turn(BaseModel):
    user: Text
    bot: Text

    def __str__(self) -> str:
        return f"User: {self.user}\n\nAssistant: {self.bot}"


class _Row(BaseModel):
    task: Text
    history: Annotated[list[_Turn], Field(min_length=1)]


def load(source: Source) -> Task:
    """Load the first dialogues of the file.

    The metrics are the judge's ``rating`` ÷ 10, if there is a judge, and the overlap with the
    reference answer (``rouge_l``).
    """
    path, judge = locate(source.data, "mtbench101.jsonl"), source.judge
    rows = list(read_rows(path, _Row))
    passages = Passages(path, [SEPARATOR.join(map(str, row.history)) for row in rows], source)
    items = []
    for number, row in enumerate(rows[: source.limit]):
        *earlier, last = row.history
        filled, _ = passages.fill([str(turn) for turn in earlier], {number}, str(number))
        item = Item(
            id=str(number + 1),
            context=SEPARATOR.join(filled),
            query=last.user,
            messages=({"role": "user", "content": PROMPT + last.user},),
            references=(last.bot,),
            max_new_tokens=1024,
            groups={"task": row.task},
        )
        items.append(item)

    def score(item: Item, answer: str) -> dict[str, float]:
        scores = {"rouge_l": rouge("rougeL", answer, item.references)}
        if judge is None:
            return scores
        reference = item.references[0] if item.groups["task"] in JUDGED_BY_REFERENCE else None
        asked: list[Message] = []
        for turn in rows[int(item.id) - 1].history:
            asked += ({"role": "user", "content": turn.user},
                      {"role": "assistant", "content": turn.bot})  # fmt: skip
        return {"rating": judge.rate(asked[:-1], answer, reference) / 10} | scores

    metrics: dict[str, MetricKind] = {"rating": "mean"} if judge else {}
    return Task("mtbench101", metrics | {"rouge_l": "mean"}, items, score)
