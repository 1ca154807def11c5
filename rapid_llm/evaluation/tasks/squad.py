"""Questions of a file in SQuAD's format (Rajpurkar et al. 2016), on paragraphs joined to a length.

The paragraph with the answer is at a random position among others of the same file. Scores are
those of the SQuAD v1.1 script, and whether the answer contains a reference.
"""

from __future__ import annotations

from random import Random

from pydantic import BaseModel, model_validator

from rapid_llm.context.prompts import build_messages
from rapid_llm.context.retrieved import SEPARATOR
from rapid_llm.evaluation.scoring import contains, exact_match, token_f1
from rapid_llm.evaluation.tasks.base import CONTEXT, SHORT_ANSWER, Item, MetricKind, Source, Task
from rapid_llm.evaluation.tasks.data import Text, locate, read_object
from rapid_llm.evaluation.tasks.passages import Passages

METRICS: dict[str, MetricKind] = {"contains": "rate", "exact_match": "rate", "f1": "mean"}


class _Answer(BaseModel):
    text: Text


class _Question(BaseModel):
    id: Text
    question: Text
    answers: list[_Answer]
    is_impossible: bool = False

    @model_validator(mode="after")
    def _is_answered(self) -> _Question:
        if not self.answers and not self.is_impossible:
            raise ValueError("'answers' is empty")
        return self


class _Paragraph(BaseModel):
    context: Text
    qas: list[_Question]


class _Article(BaseModel):
    paragraphs: list[_Paragraph]


class _File(BaseModel):
    data: list[_Article]


def load(source: Source) -> Task:
    """Load random questions of the file; those without an answer (SQuAD 2.0) are left out."""
    path = locate(source.data, "a file in SQuAD's format")
    articles = read_object(path, _File).data
    paragraphs = [paragraph for article in articles for paragraph in article.paragraphs]
    texts = [paragraph.context.strip() for paragraph in paragraphs]
    passages = Passages(path, texts, source)
    questions = [
        (gold, question)
        for gold, paragraph in enumerate(paragraphs)
        for question in paragraph.qas
        if not question.is_impossible
    ]
    # The first questions of a file are all on the first few paragraphs.
    Random(source.seed).shuffle(questions)
    items = []
    for gold, row in questions[: source.limit]:
        filled, depth = passages.fill([texts[gold]], {gold}, row.id)
        question = row.question.strip()
        item = Item(
            id=row.id,
            context=SEPARATOR.join(filled),
            query=question,
            messages=tuple(build_messages(CONTEXT, question, instruction=SHORT_ANSWER)),
            references=tuple(dict.fromkeys(answer.text for answer in row.answers)),
            max_new_tokens=32,
            groups={"depth": depth},
        )
        items.append(item)
    return Task("squad", METRICS, items, score)


def score(item: Item, answer: str) -> dict[str, float]:
    """Scores of an answer, by the names of :data:`METRICS`."""
    scorers = {"contains": contains, "exact_match": exact_match, "f1": token_f1}
    return {name: scorer(answer, item.references) for name, scorer in scorers.items()}
