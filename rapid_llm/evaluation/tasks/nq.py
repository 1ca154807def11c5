"""Natural Questions of Lost in the Middle (Liu et al. 2023, arXiv 2307.03172).

The passage with the answer is at a random position among passages of other questions. Prompt and
score (``best_subspan_em``, here ``contains``, of the answer's first line) are those of its
repository, nelson-liu/lost-in-the-middle; a local file is its ``nq-open-oracle.jsonl.gz``.
"""

from __future__ import annotations

from pydantic import BaseModel, model_validator

from rapid_llm.evaluation.scoring import normalise
from rapid_llm.evaluation.tasks import squad
from rapid_llm.evaluation.tasks.base import CONTEXT, Item, Source, Task
from rapid_llm.evaluation.tasks.data import Text, Texts, locate, read_rows
from rapid_llm.evaluation.tasks.passages import Passages

PROMPT = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant)."
)


class _Passage(BaseModel):
    title: Text
    text: Text
    isgold: bool | None = None


class _Row(BaseModel):
    question: Text
    answers: Texts
    ctxs: list[_Passage]

    @model_validator(mode="after")
    def _has_gold(self) -> _Row:
        alone = len(self.ctxs) == 1  # a single passage need not be marked
        self.ctxs = [one for one in self.ctxs if (alone if one.isgold is None else one.isgold)]
        if not self.ctxs:
            raise ValueError("'ctxs' has no passage with isgold")
        return self


def load(source: Source) -> Task:
    """Load the first questions of the file."""
    path = locate(source.data, "nq-open-oracle.jsonl.gz")
    rows = list(read_rows(path, _Row))
    gold = [row.ctxs[0] for row in rows]
    texts = [f"Document [{{}}](Title: {one.title}) {one.text}" for one in gold]
    plain = [normalise(text) for text in texts]
    passages = Passages(path, texts, source)
    items = []
    for number, row in enumerate(rows[: source.limit]):
        answers = [normalise(answer) for answer in row.answers]
        telling = {i for i, text in enumerate(plain) if any(answer in text for answer in answers)}
        filled, depth = passages.fill([texts[number]], telling | {number}, str(number))
        content = f"{PROMPT}\n\n{CONTEXT}\n\nQuestion: {row.question}\nAnswer:"
        item = Item(
            id=str(number + 1),
            context="\n".join(text.replace("{}", str(i), 1) for i, text in enumerate(filled, 1)),
            query=row.question,
            messages=({"role": "user", "content": content},),
            references=row.answers,
            max_new_tokens=100,
            groups={"depth": depth},
        )
        items.append(item)
    return Task("nq", squad.METRICS, items, _score)


def _score(item: Item, answer: str) -> dict[str, float]:
    # Only the first line, because a model that copies its text would give every answer.
    return squad.score(item, answer.split("\n")[0])
