"""Print answers and their statistics, for the commands that answer questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rapid_llm.console import Bars, show
from rapid_llm.stats import Method, Stats

if TYPE_CHECKING:
    from rapid_llm.answers import Answer
    from rapid_llm.decoder import Delta
    from rapid_llm.pipeline import RapidPipeline

COMPARED: tuple[Method, ...] = ("lc", "rag", "sd", "rapid")


@dataclass(frozen=True)
class Job:
    """A question to a pipeline, with names for its documents and progress bars.

    Attributes:
        pipeline: the pipeline that answers.
        question: the question.
        documents: names of the documents, in the pipeline's order.
        bars: progress bars.
    """

    pipeline: RapidPipeline
    question: str
    documents: Sequence[str]
    bars: Bars

    def answer(self, method: Method) -> Answer:
        """The answer by one method."""
        with self.bars:
            return self.pipeline.ask(self.question, method, progress=self.bars)

    def stream(self, method: Method) -> Answer:
        """Print the answer as it comes."""
        deltas = self.pipeline.stream(self.question, method, progress=self.bars)
        return deltas.answer(printed(deltas, self.bars))

    def compare(self, **known: Answer) -> dict[Method, Answer]:
        """Answers by all methods; ``known`` ones, by method, are not computed again."""
        return {method: known.get(method) or self.answer(method) for method in COMPARED}

    def models(self, method: Method, stats: Stats) -> dict[str, str | None]:
        """Names of the models that took part, by role; None for a role without a model."""
        decoder = self.pipeline.decoder
        idle = unread(stats)
        return {
            "target": None if stats.method == "rag" or idle else decoder.target.name,
            "drafter": None if stats.method == "lc" or idle else decoder.drafter.name,
            "embedder": None if method == "lc" else self.pipeline.builder.embedder_name,
        }

    def summary(self, method: Method, answer: Answer) -> str:
        """Models, method, retrieved and omitted tokens, and speed of an answer, in one line."""
        stats, context = answer.stats, answer.context
        parts = [names(self.models(method, stats)), stats.method]
        if stats.draft_skipped is not None and method != "lc":
            parts[1] += f" ({stats.draft_skipped})"
        if context is not None:
            count = len(context.chunks)
            chunks = "1 chunk" if count == 1 else f"{count:,} chunks"
            parts.append(f"{context.tokens:,} tokens in {chunks} retrieved")
        if stats.omitted_tokens:
            parts.append(f"{stats.omitted_tokens:,} tokens of the documents left out")
        parts.append(f"{stats.tokens_per_second:.1f} tokens/s")
        if stats.drafted_tokens:
            parts.append(f"acceptance ratio {stats.acceptance_ratio:.2f}")
            parts.append(f"{stats.tokens_per_round:.1f} tokens a round")
        return " | ".join(parts)

    def as_dict(self, method: Method, result: Answer) -> dict[str, Any]:
        """The object for ``--json``; ``start`` and ``end`` are offsets in the text as read."""
        chunks = () if result.context is None else result.context.chunks
        return {
            "text": result.text,
            "token_ids": result.token_ids,
            "finish_reason": result.finish_reason,
            "method": method,
            "stats": result.stats.as_dict(),
            "chunks": [
                {
                    "document": self.documents[chunk.document],
                    "start": chunk.start,
                    "end": chunk.end,
                    "score": chunk.score,
                }
                for chunk in chunks
            ],
            "models": self.models(method, result.stats),
            "memory": asdict(self.pipeline.decoder.memory),
        }


def printed(deltas: Iterator[Delta], bars: Bars) -> list[Delta]:
    """Print the text of a stream as it comes, and return its deltas."""
    with bars:
        read = [next(deltas)]  # after the prefill, which the bars show
    print(read[0].text, end="", flush=True)
    for delta in deltas:
        print(delta.text, end="", flush=True)
        read.append(delta)
    print(flush=True)
    return read


def names(models: Mapping[str, str | None]) -> str:
    """Roles and names of the models that took part, in one line."""
    return ", ".join(f"{role} {name}" for role, name in models.items() if name is not None)


def note_unread(stats: Stats) -> None:
    """Print a note with a remedy where nothing was retrieved, and so nothing was read."""
    if unread(stats):
        show(
            f"Nothing was retrieved ({stats.draft_skipped}), so nothing was read: lower "
            "--threshold, or have the whole documents read with --on-empty read_all.",
            stderr=True,
        )


def unread(stats: Stats) -> bool:
    """Whether neither model read anything, because nothing was retrieved."""
    return not stats.prompt_tokens and not stats.draft_prompt_tokens


def comparison(results: Mapping[Method, Answer]) -> Table:
    """Table of the answers of several methods and their speed."""
    table = Table("method", "answer", box=SIMPLE_HEAD)
    for heading in ("tokens/s", "acceptance", "tokens\na round", "prefill\nseconds"):
        table.add_column(heading, justify="right")
    for method, result in results.items():
        stats = result.stats
        table.add_row(
            method,
            Text(" ".join(result.text.split())),
            f"{stats.tokens_per_second:.1f}",
            f"{stats.acceptance_ratio:.2f}" if stats.drafted_tokens else "–",
            f"{stats.tokens_per_round:.1f}",
            f"{stats.prefill_seconds:.1f}",
        )
    notes = []
    stats = results["rapid"].stats
    if stats.draft_skipped is not None and not unread(stats):
        notes.append(f"nothing was drafted: {stats.draft_skipped}")
    if stats.omitted_tokens:
        notes.append(f"{stats.omitted_tokens:,} tokens of the documents were left out")
    if notes:
        table.caption = Text("\n".join(notes))
    return table
