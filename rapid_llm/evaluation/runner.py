"""Run a task: answer its items by each method, and record the answers.

The outer loop is over items, so that the target reads a document once for all methods. Before each
method the kept KV is brought into a state that depends on the item only: rounding depends on the
sizes of passes, and a resumed run must give the same answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from rapid_llm.config import SamplingParams
from rapid_llm.context import RetrievalContext
from rapid_llm.context.prompts import Fitted, fit_documents
from rapid_llm.decoder import Delta, GenerationResult, RapidDecoder
from rapid_llm.encoding import encode_prompt
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.evaluation import speculative_rag
from rapid_llm.evaluation.journal import Journal, Positions, Record, add_positions
from rapid_llm.evaluation.methods import DRAFTER_ALONE, MethodSpec
from rapid_llm.evaluation.retrieval import Retrieval, found, other_context
from rapid_llm.evaluation.tasks.base import CONTEXT, Item, Message, Task
from rapid_llm.progress import Progress
from rapid_llm.stats import Stats

Render = Callable[[str], list[Message]]
"""Function from a context to the messages of a question."""


class _Turn(NamedTuple):
    """A question with the target's prompt, from which ``omitted_tokens`` tokens were cut."""

    render: Render
    prompt: list[int]
    omitted_tokens: int
    sampling: SamplingParams


class _Answer(NamedTuple):
    text: str
    stats: Stats
    accepted_at: Positions = ()


@dataclass(frozen=True)
class Evaluation:
    """A run of a task by several methods, with greedy decoding.

    Attributes:
        decoder: target and drafter.
        task: the task.
        methods: the methods.
        retrieval: retrieval of the drafter's contexts.
        seed: seed of irrelevant contexts and of Speculative RAG's subsets.
    """

    decoder: RapidDecoder
    task: Task
    methods: Sequence[MethodSpec]
    retrieval: Retrieval
    seed: int = 0

    def run(self, journal: Journal, progress: Progress = lambda done, total: None) -> None:
        """Answer, item by item, all that the journal lacks, and add the answers to it.

        Args:
            journal: journal of the run.
            progress: callback, called with (number of answers, total number).

        Raises:
            RapidError: an item does not fit a model, the judge cannot be reached, …; the answers so
                far are in the journal, and the same call resumes the run.
        """
        total, done = len(self.task.items) * len(self.methods), 0
        reads = any(method.base not in DRAFTER_ALONE for method in self.methods)
        for index, item in enumerate(self.task.items):
            missing = [one for one in self.methods if (item.id, one.name) not in journal]
            done += len(self.methods) - len(missing)
            if not missing:
                continue
            first = self._turn(item, item.messages, item.max_new_tokens)
            kept = None if reads else 0
            for method in missing:
                progress(done, total)
                if kept is None or self.decoder.keep_only(first.prompt) < kept:
                    self.decoder.generate(first.prompt, sampling=SamplingParams(max_new_tokens=1))
                    kept = self.decoder.keep_only(first.prompt)
                if kept == 0:  # too short or too large to be kept: each method reads it itself
                    self.decoder.clear_cache()
                journal.append(self._ask(index, method, first))
                done += 1
        progress(total, total)

    def _ask(self, index: int, method: MethodSpec, first: _Turn) -> Record:
        """The answer of one method to one item, with its scores."""
        item = self.task.items[index]
        read = self._retrieve(index, method)
        skipped = None if read is None else read.empty_reason
        base, read = (method.base, read) if skipped is None else ("lc", None)
        if base == "speculative-rag":
            answers = [self._speculative_rag(method, first, read)]
        else:
            answers = [self._answer(base, method, first, read)]
        if item.follow_up is not None:
            asked = {"role": "user", "content": item.follow_up}
            turn = self._turn(item, [asked], item.follow_up_tokens, answer=answers[0].text)
            answers.append(self._answer(base, method, turn, read))
        text = answers[-1].text
        stats = Stats.together([answer.stats for answer in answers])
        stats.draft_skipped = skipped  # for the summary, which counts items without retrieval
        return Record(
            task=self.task.name,
            item=item.id,
            method=method.name,
            base=method.base,
            options=method.options,
            answer=text,
            scores=self.task.score(item, text),
            groups=item.groups,
            stats=stats.as_dict(),
            accepted_at=add_positions(answer.accepted_at for answer in answers),
            retrieved=found(item, read.text) if read is not None else None,
        )

    def _retrieve(self, index: int, method: MethodSpec) -> RetrievalContext | None:
        if method.retrieval is None:
            return None
        items = self.task.items
        irrelevant = method.retrieval.irrelevant
        text = other_context(items, index, self.seed) if irrelevant else items[index].context
        return self.retrieval.context(method.retrieval, text, items[index].query)

    def _turn(self, item: Item, messages: Sequence[Message], new: int, **said: str) -> _Turn:
        def render(context: str) -> list[Message]:
            texts = {CONTEXT: context} | {f"{{{name}}}": text for name, text in said.items()}
            places = re.compile("|".join(map(re.escape, texts)))

            def fill(content: str) -> str:  # in one pass, because inserted texts are data
                return places.sub(lambda at: texts[at[0]], content, count=len(texts))

            return [message | {"content": fill(message["content"])} for message in messages]

        sampling = SamplingParams(max_new_tokens=new, seed=self.seed)
        whole = self._fit(render, item.context, self.decoder.target, new)
        prompt = encode_prompt(whole.prompt, self.decoder.tokenizer)
        return _Turn(render, prompt, whole.omitted_tokens, sampling)

    def _fit(self, render: Render, context: str, reader: ModelRunner, new: int) -> Fitted:
        tokenizer, window = self.decoder.tokenizer, reader.context_window
        # As the long-context benchmarks shorten documents: without a mark.
        fit = partial(fit_documents, truncate="middle", mark="")
        return fit([context], lambda texts: render(texts[0]), tokenizer, window, new)

    def _answer(
        self, base: str, method: MethodSpec, turn: _Turn, read: RetrievalContext | None
    ) -> _Answer:
        draft, alone = None, base in DRAFTER_ALONE
        if read is not None:
            new = turn.sampling.max_new_tokens
            draft = self._fit(turn.render, read.text, self.decoder.drafter, new).prompt
        stream = self.decoder.stream(
            None if alone else turn.prompt,
            draft,
            sampling=turn.sampling,
            speculation=None if base == "lc" else method.speculation,
            confidence=1.0 if read is None else read.confidence,
        )
        chunks = list(stream)
        result = GenerationResult.from_deltas(chunks)
        result.stats.omitted_tokens = 0 if alone else turn.omitted_tokens
        return _Answer(result.text, result.stats, accepted_at(chunks))

    def _speculative_rag(
        self, method: MethodSpec, turn: _Turn, read: RetrievalContext | None
    ) -> _Answer:
        assert read is not None
        assert method.retrieval is not None
        chunks = [chunk.text for chunk in read.chunks]
        vectors = self.retrieval.embed(method.retrieval, chunks)
        render, sampling = turn.render, turn.sampling
        return _Answer(*speculative_rag.answer(self.decoder, render, chunks, vectors, sampling))


def accepted_at(chunks: Sequence[Delta]) -> Positions:
    """Acceptance by position in the drafts of a stream."""
    rounds = []
    drafted = accepted = 0
    for chunk in chunks:
        n, k = chunk.stats.drafted_tokens - drafted, chunk.stats.accepted_tokens - accepted
        rounds.append(tuple((1, int(at < k)) for at in range(min(n, k + 1))))
        drafted, accepted = chunk.stats.drafted_tokens, chunk.stats.accepted_tokens
    return add_positions(rounds)
