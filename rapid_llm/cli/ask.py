"""``rapid-llm ask``: answers to questions about documents."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rapid_llm.cli.answers import Job, comparison, names, note_unread, unread
from rapid_llm.cli.app import app
from rapid_llm.cli.documents import read_documents
from rapid_llm.cli.options import with_options
from rapid_llm.cli.questions import answer_each, read_questions
from rapid_llm.cli.ranks import read_once
from rapid_llm.cli.session import converse
from rapid_llm.config import EngineConfig, RetrievalConfig, SamplingParams, SpeculationConfig
from rapid_llm.console import Bars, show, status
from rapid_llm.errors import DocumentError, InvalidParameterError
from rapid_llm.stats import Method

if TYPE_CHECKING:
    from rapid_llm.generation import GenerationResult


@app.command()
@with_options(SamplingParams, SpeculationConfig, EngineConfig, RetrievalConfig)
def ask(
    sampling: SamplingParams,
    speculation: SpeculationConfig,
    engine: EngineConfig,
    retrieval: RetrievalConfig,
    documents: Annotated[
        list[str],
        typer.Argument(
            metavar="DOCUMENT",
            help="Text, Markdown, HTML or PDF files, or folders and patterns (reports/**/*.pdf) of "
            "such; - is standard input. Read in the order of their names, or in this one with "
            "--order given.",
            show_default=False,
        ),
    ],
    question: Annotated[
        str | None,
        typer.Option(
            "--question",
            "-q",
            help="What to answer; without it, questions are typed at the terminal.",
            show_default=False,
        ),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A question a line, or an object with question and id in JSON; - is standard "
            "input. Prints an object a line.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="rapid; sd: without knowledge transfer; lc: the target alone over the whole; "
            "rag: the drafter alone over what was retrieved."
        ),
    ] = "rapid",
    compare: Annotated[
        bool, typer.Option("--compare", help="Run all four methods and show a table.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    schema: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A JSON schema: every answer is JSON that it allows. The exit status is 1 where "
            "an answer was cut at --max-new-tokens.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Answer questions about documents."""
    _check_question(documents, question, questions, compare or as_json)
    if schema is not None:
        sampling = _with_schema(sampling, schema)
    batch = None if questions is None else read_once(partial(read_questions, questions))
    texts = read_once(partial(read_documents, documents))
    shown = sys.stderr.isatty() and not as_json and batch is None
    drafter = f" and {engine.drafter}" if engine.drafter else ""
    with status(f"loading {engine.model}{drafter}", shown):
        from rapid_llm.decoder import RapidDecoder
        from rapid_llm.pipeline import RapidPipeline

        pipeline = RapidPipeline(
            RapidDecoder.from_config(engine),
            texts,
            retrieval=retrieval,
            sampling=sampling,
            speculation=speculation,
        )
    bars = Bars(shown)
    read = pipeline.document_ids or ()

    def job(text: str) -> Job:
        return Job(pipeline, text, read, bars)

    results: list[GenerationResult] = []

    def outcome(text: str) -> dict[str, Any]:
        given, told = _as_json(job(text), method, compare)
        results.extend(given)
        return told

    status_of_all = 0
    if batch is not None:
        status_of_all = answer_each(batch, outcome)
    elif question is None:
        converse(pipeline, read, method, bars)
    elif as_json:
        print(json.dumps(outcome(question)), flush=True)
    elif compare:
        results += _compare(job(question))
    else:
        result = job(question).stream(method)
        note_unread(result.stats)
        if not unread(result.stats):
            show(job(question).summary(method, result), stderr=True)
        results.append(result)
    return max(status_of_all, 0 if schema is None else _status_of_cut(results))


def _status_of_cut(results: Sequence[GenerationResult]) -> int:
    """Exit status of answers that are to be JSON: 1, and a line, if one was cut."""
    cut = [len(result.token_ids) for result in results if result.finish_reason == "length"]
    if not cut:
        return 0
    those = "The answer was" if len(results) == 1 else f"{len(cut)} of {len(results)} answers were"
    show(
        f"{those} cut after {max(cut)} tokens, so the JSON is not complete: raise "
        "--max-new-tokens.",
        stderr=True,
    )
    return 1


def _with_schema(sampling: SamplingParams, path: str) -> SamplingParams:
    """Sampling options with the JSON schema in a file as constraint.

    Raises:
        InvalidParameterError: the file is not readable, or holds no schema that can be enforced; or
            there is another constraint.
    """
    if sampling.constraint is not None:
        raise InvalidParameterError("--schema and --constraint exclude each other: give one")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InvalidParameterError(
            f"--schema {path}: the file cannot be read ({error}); give one with a JSON schema"
        ) from error
    return replace(sampling, constraint={"json": text})


def _check_question(
    documents: Sequence[str], question: str | None, questions: str | None, at_once: bool
) -> None:
    """Validate where questions come from.

    Args:
        documents: the documents' names.
        question, questions: as given.
        at_once: the output asked for is that of a question known beforehand.

    Raises:
        DocumentError: the question is empty.
        InvalidParameterError: there is none, or two sources of questions, or of standard input.
    """
    if question is not None and questions is not None:
        raise InvalidParameterError("--question and --questions exclude each other: give one")
    if question is not None:
        if not question.strip():
            raise DocumentError("the question is empty; give one with --question")
    elif questions is not None:
        if questions == "-" and "-" in documents:
            raise InvalidParameterError(
                "- is given as a document and as --questions, but standard input is read once: "
                "give a file for one of them"
            )
    elif at_once or "-" in documents or not sys.stdin.isatty():
        raise InvalidParameterError(
            "no question was given: give one with --question, or a file of them with --questions; "
            "they are typed only where standard input is a terminal, and without --json and "
            "--compare"
        )


def _as_json(
    job: Job, method: Method, compare: bool
) -> tuple[Collection[GenerationResult], dict[str, Any]]:
    """The answers, and the object that tells them."""
    results = job.compare() if compare else {method: job.answer(method)}
    note_unread(results["rapid" if compare else method].stats)
    objects = [job.as_dict(each, result) for each, result in results.items()]
    return results.values(), {"results": objects} if compare else objects[0]


def _compare(job: Job) -> Collection[GenerationResult]:
    results = job.compare()
    stats = results["rapid"].stats
    show(comparison(results))
    show(names(job.models("rapid", stats)), stderr=True)
    note_unread(stats)
    return results.values()
