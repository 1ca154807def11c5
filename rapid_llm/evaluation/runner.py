"""Run a task: answer its items by each method, and record the answers.

The outer loop is over items, so that the target reads a document once for all methods. Before each
method the kept KV is brought into a state that depends on the item only: rounding depends on the
sizes of passes, and a resumed run must give the same answers. A decoder whose ``max_sequences`` is
more than 1 answers all questions on a document at once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from rapid_llm.batching import GenerationRequest
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

Asking = Generator[GenerationRequest, Sequence[Delta], Record]
"""One method's work on one item: yields requests, is sent their deltas, and returns the record."""


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
    """A run of a task by several methods, with greedy decoding."""

    decoder: RapidDecoder  # target and drafter
    task: Task
    methods: Sequence[MethodSpec]
    retrieval: Retrieval  # retrieval of the drafter's contexts
    seed: int = 0  # seed of irrelevant contexts and of Speculative RAG's subsets

    def run(self, journal: Journal, progress: Progress = lambda done, total: None) -> None:
        """Answer, item by item, all that the journal lacks, and add the answers to it.

        Args:
            journal: journal of the run.
            progress: callback, called with (number of answers, total number).

        Raises:
            RapidError: an item does not fit a model, the judge cannot be reached, …; the answers so
                far are in the journal, and the same call resumes the run.
        """
        items, at_once = self.task.items, self.decoder.max_sequences > 1
        missing = [
            (index, method)
            for index, item in enumerate(items)
            for method in self.methods
            if (item.id, method.name) not in journal
        ]
        reads = any(method.base not in DRAFTER_ALONE for method in self.methods)
        total = len(items) * len(self.methods)
        done = total - len(missing)
        progress(done, total)
        # Neighbours on one document are asked at once.
        for _, group in groupby(missing, lambda one: items[one[0]].context if at_once else one[0]):
            asked = list(group)
            turns = {
                index: self._turn(items[index], items[index].messages, items[index].max_new_tokens)
                for index in dict.fromkeys(index for index, _ in asked)
            }
            first, kept = turns[asked[0][0]].prompt, None if reads else 0
            for part in [asked] if at_once else [[one] for one in asked]:
                if kept is None or self.decoder.keep_only(first) < kept:
                    self.decoder.generate(first, sampling=SamplingParams(max_new_tokens=1))
                    kept = self.decoder.keep_only(first)
                if kept == 0:  # too short or too large to be kept: each method reads it itself
                    self.decoder.clear_cache()
                most = min(len(part), self.decoder.max_sequences)
                asking = [self._ask(i, method, turns[i], most) for i, method in part]
                for record in self._answered(asking):
                    journal.append(record)
                    done += 1
                    progress(done, total)

    def _answered(self, askings: Sequence[Asking]) -> Iterator[Record]:
        """The records in order, each as soon as it and those before it are known."""
        states = [_advanced(asking, None) for asking in askings]
        answers: Iterator[tuple[int, list[Delta]]] = iter(())
        for place in range(len(states)):
            while not isinstance(record := states[place], Record):
                for index, deltas in answers:
                    states[index] = _advanced(askings[index], deltas)
                    break
                else:  # all that was asked is answered, and some ask on
                    requests = enumerate(states)
                    answers = self._generated(
                        {i: one for i, one in requests if isinstance(one, GenerationRequest)}
                    )
            yield record

    def _generated(
        self, requests: Mapping[int, GenerationRequest]
    ) -> Iterator[tuple[int, list[Delta]]]:
        """The deltas of each request, as soon as it is answered."""
        if self.decoder.max_sequences == 1:
            for key, one in requests.items():
                yield key, list(self.decoder.stream(*one.prompts, **one.options))
            return
        keys, deltas = list(requests), defaultdict[int, list[Delta]](list)
        for index, delta in self.decoder.stream_many(requests.values()):
            deltas[index].append(delta)
            if delta.finish_reason is not None:
                yield keys[index], deltas[index]

    def _ask(self, index: int, method: MethodSpec, first: _Turn, at_once: int) -> Asking:
        """The answer of one method to one item, with its scores."""
        items, item, spec = self.task.items, self.task.items[index], method.retrieval
        read: RetrievalContext | None = None
        if spec is not None:
            text = other_context(items, index, self.seed) if spec.irrelevant else item.context
            read = self.retrieval.context(spec, text, item.query)
        skipped = None if read is None else read.empty_reason
        base, read = (method.base, read) if skipped is None else ("lc", None)
        if base == "speculative-rag" and spec is not None and read is not None:
            chunks = [chunk.text for chunk in read.chunks]
            vectors = self.retrieval.embed(spec, chunks)
            answer = partial(speculative_rag.answer, self.decoder, first.render)
            answers = [_Answer(*answer(chunks, vectors, first.sampling))]
        else:
            answers = [(yield from self._answer(base, method, first, read))]
        if item.follow_up is not None:
            asked = {"role": "user", "content": item.follow_up}
            turn = self._turn(item, [asked], item.follow_up_tokens, answer=answers[0].text)
            answers.append((yield from self._answer(base, method, turn, read)))
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
            at_once=at_once,
        )

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
    ) -> Generator[GenerationRequest, Sequence[Delta], _Answer]:
        draft, alone = None, base in DRAFTER_ALONE
        if read is not None:
            new = turn.sampling.max_new_tokens
            draft = self._fit(turn.render, read.text, self.decoder.drafter, new).prompt
        deltas = yield GenerationRequest(
            None if alone else turn.prompt,
            draft,
            sampling=turn.sampling,
            speculation=None if base == "lc" else method.speculation,
            confidence=1.0 if read is None else read.confidence,
        )
        result = GenerationResult.from_deltas(deltas)
        result.stats.omitted_tokens = 0 if alone else turn.omitted_tokens
        return _Answer(result.text, result.stats, accepted_at(deltas))


def _advanced(asking: Asking, deltas: Any) -> GenerationRequest | Record:
    """The next request of a method on an item, or its record."""
    try:
        return asking.send(deltas)
    except StopIteration as end:
        record: Record = end.value
        return record


def accepted_at(chunks: Sequence[Delta]) -> Positions:
    """Acceptance by position in the drafts of a stream."""
    rounds = []
    drafted = accepted = 0
    for chunk in chunks:
        n, k = chunk.stats.drafted_tokens - drafted, chunk.stats.accepted_tokens - accepted
        rounds.append(tuple((1, int(at < k)) for at in range(min(n, k + 1))))
        drafted, accepted = chunk.stats.drafted_tokens, chunk.stats.accepted_tokens
    return add_positions(rounds)
