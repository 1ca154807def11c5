"""Tasks whose contexts are joined from the passages of one file to a length.

- ``squad``, a file in SQuAD's format (Rajpurkar et al. 2016): the paragraph with the answer is at a
  random position among others. Scores are those of the SQuAD v1.1 script, and whether the answer
  contains a reference.
- ``nq``, Natural Questions of Lost in the Middle (Liu et al. 2023, arXiv 2307.03172): the passage
  with the answer is among those of other questions. Prompt and score (``best_subspan_em``, here
  ``contains``, of the answer's first line) are those of its repository,
  nelson-liu/lost-in-the-middle; a local file is its ``nq-open-oracle.jsonl.gz``.
- ``mtbench101``, MT-Bench-101 (Bai et al. 2024, arXiv 2402.14762) as in RAPID's paper (section
  4.4): the question is the last message of a dialogue, whose earlier turns are scattered over a
  long history of other dialogues. The paper has 122K tokens of history and the first 100 dialogues,
  rated by GPT-4. A local file is the benchmark's ``mtbench101.jsonl``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from rapid_llm.context.retrieved import SEPARATOR
from rapid_llm.encoding import encode_literal
from rapid_llm.errors import DataError, InvalidParameterError
from rapid_llm.evaluation.data import Text, Texts, locate, read_object, read_rows
from rapid_llm.evaluation.scoring import contains, exact_match, normalise, rouge, token_f1
from rapid_llm.evaluation.tasks.base import (
    Item,
    Metrics,
    Source,
    Task,
    brief,
    depth_group,
    prompt,
)

METRICS: Metrics = {"contains": "rate", "exact_match": "rate", "f1": "mean"}
"""Scores of the first two tasks."""

# Mathematics and reasoning have one right answer, so the benchmark shows the judge the reference.
JUDGED_BY_REFERENCE = ("MR", "GR")


class Passages:
    """The passages of a file, of which contexts of ``source.context_tokens`` tokens are made."""

    def __init__(self, path: Path, texts: Sequence[str], source: Source) -> None:
        self._path, self._texts, self._source = path, texts, source
        self._tokens = [self._length(text) for text in texts]

    def fill(self, kept: Sequence[str], banned: set[int], draw: str) -> tuple[list[str], str]:
        """Fill a context with randomly drawn passages around required texts.

        The texts ``kept`` stand in this order at random positions, the passages with indices
        ``banned`` are not drawn, and ``draw`` adds to the source's seed. Returns the passages in
        order, and the depth group of the first required text.

        Raises:
            InvalidParameterError: the required texts are longer than the context.
            DataError: all passages together are shorter than the context.
        """
        rng, tokens = Random(f"{self._source.seed}/{draw}"), self._source.context_tokens or 0
        room = tokens - sum(map(self._length, kept))
        if room < 0:
            raise InvalidParameterError(
                f"context_tokens={tokens} is too short for {tokens - room} tokens of "
                f"{self._path} that have to be in the context: give at least {tokens - room}"
            )
        others = [i for i in range(len(self._texts)) if i not in banned]
        rng.shuffle(others)
        texts = []
        for i in others:
            if self._tokens[i] <= room:
                room -= self._tokens[i]
                texts.append(self._texts[i])
        if room > 0 and len(texts) == len(others):
            raise DataError(
                f"{self._path} holds passages for a context of {tokens - room} tokens, not of "
                f"context_tokens={tokens}: lower it, or give a larger file with --data PATH"
            )
        gaps = sorted(rng.randint(0, len(texts)) for _ in kept)
        places = [gap + before for before, gap in enumerate(gaps)]
        for place, text in zip(places, kept, strict=True):
            texts.insert(place, text)
        lengths = [*map(len, texts)]
        return texts, depth_group(sum(lengths[: places[0]]) / sum(lengths) if places else 0)

    def _length(self, text: str) -> int:
        return len(encode_literal(SEPARATOR + text, self._source.tokenizer))


# --- SQuAD ---------------------------------------------------------------------------------------


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


def squad(source: Source) -> Task:
    """Load random questions of the file; those without an answer (SQuAD 2.0) are left out."""
    path = locate(source.data, "a file in SQuAD's format")
    paragraphs = [one for article in read_object(path, _File).data for one in article.paragraphs]
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
            messages=brief(question),
            references=tuple(dict.fromkeys(answer.text for answer in row.answers)),
            max_new_tokens=32,
            groups={"depth": depth},
        )
        items.append(item)
    return Task("squad", METRICS, items, _score)


def _score(item: Item, answer: str) -> dict[str, float]:
    scorers = {"contains": contains, "exact_match": exact_match, "f1": token_f1}
    return {name: scorer(answer, item.references) for name, scorer in scorers.items()}


# --- Natural Questions ---------------------------------------------------------------------------


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


def nq(source: Source) -> Task:
    """Load the first questions of the file."""
    path = locate(source.data, "nq-open-oracle.jsonl.gz")
    rows = list(read_rows(path, _Row))
    texts = [f"Document [{{}}](Title: {row.ctxs[0].title}) {row.ctxs[0].text}" for row in rows]
    plain = [normalise(text) for text in texts]
    passages = Passages(path, texts, source)
    items = []
    for number, row in enumerate(rows[: source.limit]):
        answers = [normalise(answer) for answer in row.answers]
        telling = {i for i, text in enumerate(plain) if any(answer in text for answer in answers)}
        filled, depth = passages.fill([texts[number]], telling | {number}, str(number))
        item = Item(
            id=str(number + 1),
            context="\n".join(text.replace("{}", str(i), 1) for i, text in enumerate(filled, 1)),
            query=row.question,
            messages=({"role": "user", "content": prompt("nq", row.question)},),
            references=row.answers,
            max_new_tokens=100,
            groups={"depth": depth},
        )
        items.append(item)
    # Only the first line, because a model that copies its text would give every answer.
    return Task("nq", METRICS, items, lambda item, answer: _score(item, answer.split("\n")[0]))


# --- MT-Bench-101 --------------------------------------------------------------------------------


class _Turn(BaseModel):
    user: Text
    bot: Text

    def __str__(self) -> str:
        return f"User: {self.user}\n\nAssistant: {self.bot}"


class _Dialogue(BaseModel):
    task: Text
    history: Annotated[list[_Turn], Field(min_length=1)]


def mtbench101(source: Source) -> Task:
    """Load the first dialogues of the file.

    The metrics are the judge's ``rating`` ÷ 10, if there is a judge, and the overlap with the
    reference answer (``rouge_l``).
    """
    path, judge = locate(source.data, "mtbench101.jsonl"), source.judge
    rows = list(read_rows(path, _Dialogue))
    passages = Passages(path, [SEPARATOR.join(map(str, row.history)) for row in rows], source)
    items = []
    for number, row in enumerate(rows[: source.limit]):
        *earlier, last = row.history
        filled, _ = passages.fill([str(turn) for turn in earlier], {number}, str(number))
        item = Item(
            id=str(number + 1),
            context=SEPARATOR.join(filled),
            query=last.user,
            messages=({"role": "user", "content": prompt("mtbench101", last.user)},),
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
        said = [
            {"role": role, "content": content}
            for turn in rows[int(item.id) - 1].history
            for role, content in (("user", turn.user), ("assistant", turn.bot))
        ]
        return {"rating": judge.rate(said[:-1], answer, reference) / 10} | scores

    metrics: Metrics = {"rating": "mean"} if judge else {}
    return Task("mtbench101", {**metrics, "rouge_l": "mean"}, items, score)
