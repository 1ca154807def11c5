"""Asks the items of a task by each method, and keeps the answers.

Items are outermost, so that the target reads a document once for all methods. Before each of them
the kept KV is brought into one state that depends on the item alone: rounding depends on how many
tokens a pass reads, and a run that was interrupted has to answer as one that was not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rapid_llm.config import SamplingParams
from rapid_llm.context import RetrievalContext
from rapid_llm.context.prompts import Fitted, fit_documents
from rapid_llm.decoder import Delta, GenerationResult, RapidDecoder
from rapid_llm.encoding import encode_prompt
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.evaluation import speculative_rag
from rapid_llm.evaluation.journal import Journal
from rapid_llm.evaluation.methods import DRAFTER_ALONE, MethodSpec
from rapid_llm.evaluation.records import Record, add_positions
from rapid_llm.evaluation.retrieval import Retrieval, found, other_context
from rapid_llm.evaluation.tasks.base import ANSWER, CONTEXT, Item, Message, Task
from rapid_llm.stats import Stats

Progress = Callable[[int, int], None]
"""Called with (answers that are there, answers asked for)."""


def evaluate(
    decoder: RapidDecoder,
    task: Task,
    methods: Sequence[MethodSpec],
    retrieval: Retrieval,
    journal: Journal,
    *,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> None:
    """Ask what the journal does not hold yet, item by item; answers go to the journal.

    Args:
        decoder: target and drafter; decoding is greedy.
        task: the items and their scorer.
        methods: with different names.
        retrieval: made for what these methods retrieve.
        journal: of a run with these settings.
        seed: of irrelevant contexts and of Speculative RAG's subsets.
        progress: told how far the run has come.

    Raises:
        RapidError: an item does not fit a model, the judge cannot be reached, …; the answers so far
            are in the journal, and the same call goes on with the rest.
    """
    evaluation = _Evaluation(decoder, task, retrieval, seed)
    total, done = len(task.items) * len(methods), 0
    reads = any(method.base not in DRAFTER_ALONE for method in methods)
    for index, item in enumerate(task.items):
        missing = [method for method in methods if (item.id, method.name) not in journal]
        done += len(methods) - len(missing)
        first = evaluation.first_turn(item) if missing else None
        kept = None if reads else 0
        for method in missing:
            assert first is not None
            progress(done, total)
            if kept is None or decoder.keep_only(first.prompt) < kept:
                kept = _read(decoder, first.prompt)
            if kept == 0:  # it is short or would not fit, so that each method reads on its own
                decoder.clear_cache()
            journal.append(evaluation.ask(index, method, first))
            done += 1
    progress(total, total)


def _read(decoder: RapidDecoder, prompt: list[int]) -> int:
    """Keep the KV of this prompt and nothing else; of how many tokens."""
    decoder.generate(prompt, sampling=SamplingParams(max_new_tokens=1))
    return decoder.keep_only(prompt)


@dataclass(frozen=True)
class _Turn:
    """A question: its messages around a context, and as the target reads it, in tokens.

    ``omitted_tokens`` of the context do not fit into the target's window.
    """

    render: Callable[[str], list[Message]]
    prompt: list[int]
    omitted_tokens: int
    sampling: SamplingParams


@dataclass(frozen=True)
class _Answer:
    text: str
    stats: Stats
    accepted_at: tuple[tuple[int, int], ...] = ()


class _Evaluation:
    def __init__(self, decoder: RapidDecoder, task: Task, retrieval: Retrieval, seed: int) -> None:
        self._decoder = decoder
        self._task = task
        self._retrieval = retrieval
        self._seed = seed

    def first_turn(self, item: Item) -> _Turn:
        def render(context: str) -> list[Message]:
            return [
                message | {"content": message["content"].replace(CONTEXT, context, 1)}
                for message in item.messages
            ]

        return self._turn(render, item.context, item.max_new_tokens)

    def ask(self, index: int, method: MethodSpec, first: _Turn) -> Record:
        """The answer of one method to one item, with its scores."""
        item = self._task.items[index]
        read = self._retrieve(index, method)
        skipped = None if read is None else read.empty_reason
        if skipped is not None:
            answers = self._answers(item, MethodSpec("lc", "lc"), first, None)
        else:
            answers = self._answers(item, method, first, read)
        stats = Stats.together([answer.stats for answer in answers])
        stats.draft_skipped = skipped  # the summary counts what the retrieval left out
        text = answers[-1].text
        return Record(
            task=self._task.name,
            item=item.id,
            method=method.name,
            base=method.base,
            options=method.options,
            answer=text,
            scores=self._task.score(item, text),
            groups=item.groups,
            stats=stats.as_dict(),
            accepted_at=add_positions([answer.accepted_at for answer in answers]),
            retrieved=found(item, read.text) if read is not None and read.chunks else None,
        )

    def _retrieve(self, index: int, method: MethodSpec) -> RetrievalContext | None:
        if method.retrieval is None:
            return None
        items = self._task.items
        irrelevant = method.retrieval.irrelevant
        text = other_context(items, index, self._seed) if irrelevant else items[index].context
        return self._retrieval.context(method.retrieval, text, items[index].query)

    def _answers(
        self, item: Item, method: MethodSpec, first: _Turn, read: RetrievalContext | None
    ) -> list[_Answer]:
        """One answer, or two where the first is followed up."""
        if method.base == "speculative-rag":
            answers = [self._speculative_rag(method, first, read)]
        else:
            answers = [self._answer(method, first, read)]
        if item.follow_up is not None:
            follow_up, said = item.follow_up, answers[0].text

            def render(context: str) -> list[Message]:
                texts = {CONTEXT: context, ANSWER: said}
                pattern = f"{re.escape(CONTEXT)}|{re.escape(ANSWER)}"  # in one go: both are data
                content = re.sub(pattern, lambda found: texts[found[0]], follow_up)
                return [{"role": "user", "content": content}]

            turn = self._turn(render, item.context, item.follow_up_tokens)
            answers.append(self._answer(method, turn, read))
        return answers

    def _turn(
        self, render: Callable[[str], list[Message]], context: str, max_new_tokens: int
    ) -> _Turn:
        whole = self._fit(render, context, self._decoder.target, max_new_tokens)
        return _Turn(
            render,
            encode_prompt(whole.prompt, self._decoder.tokenizer),
            whole.omitted_tokens,
            SamplingParams(max_new_tokens=max_new_tokens, seed=self._seed),
        )

    def _fit(
        self,
        render: Callable[[str], list[Message]],
        context: str,
        runner: ModelRunner,
        max_new_tokens: int,
    ) -> Fitted:
        tokenizer, window = self._decoder.tokenizer, runner.context_window
        return fit_documents(
            [context],
            lambda texts: render(texts[0]),
            tokenizer,
            window,
            max_new_tokens,
            "middle",
            mark="",  # as the long-context benchmarks shorten documents
        )

    def _answer(self, method: MethodSpec, turn: _Turn, read: RetrievalContext | None) -> _Answer:
        draft = None
        if read is not None:
            new = turn.sampling.max_new_tokens
            draft = self._fit(turn.render, read.text, self._decoder.drafter, new).prompt
        alone = method.base in DRAFTER_ALONE
        stream = self._decoder.stream(
            None if alone else turn.prompt,
            draft,
            sampling=turn.sampling,
            speculation=method.speculation,
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
        vectors = self._retrieval.embed(method.retrieval, chunks)
        return _Answer(
            *speculative_rag.answer(self._decoder, turn.render, chunks, vectors, turn.sampling)
        )


def accepted_at(chunks: Sequence[Delta]) -> tuple[tuple[int, int], ...]:
    """For each position of the drafts in a stream: (times judged, times accepted)."""
    rounds = []
    drafted = accepted = 0
    for chunk in chunks:
        n, k = chunk.stats.drafted_tokens - drafted, chunk.stats.accepted_tokens - accepted
        rounds.append(tuple((1, int(at < k)) for at in range(min(n, k + 1))))
        drafted, accepted = chunk.stats.drafted_tokens, chunk.stats.accepted_tokens
    return add_positions(rounds)
