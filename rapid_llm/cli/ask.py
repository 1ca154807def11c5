"""``rapid-llm ask``: answers to questions about documents."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rapid_llm.cli.answers import Job, comparison, names, note_unread, unread
from rapid_llm.cli.app import app
from rapid_llm.cli.documents import read_documents
from rapid_llm.cli.options import with_options
from rapid_llm.cli.questions import print_answers, read_questions
from rapid_llm.cli.ranks import read_once
from rapid_llm.cli.session import converse
from rapid_llm.config import EngineConfig, RetrievalConfig, SamplingParams, SpeculationConfig
from rapid_llm.console import Bars, show, status
from rapid_llm.errors import DocumentError, InvalidParameterError, RapidError
from rapid_llm.stats import Method

if TYPE_CHECKING:
    from rapid_llm.pipeline import RapidPipeline
    from rapid_llm.results import GenerationResult


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
            "such; - is standard input. They are read in the order of their names, or as given "
            "here with --order given.",
            show_default=False,
        ),
    ],
    question: Annotated[
        str | None,
        typer.Option(
            "--question",
            "-q",
            help="Question to answer; without it, questions are typed at the terminal.",
            show_default=False,
        ),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="File with one question per line, or one JSON object with question and id per "
            "line; - is standard input. One JSON object per question is printed.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="rapid; sd, speculation without knowledge transfer; lc, the target alone over the "
            "whole documents; rag, the drafter alone over the retrieved passages."
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
            help="File with a JSON schema that every answer follows. The exit status is 1 where an "
            "answer was cut at --max-new-tokens.",
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
        from rapid_llm.context.builder import require_retrieval
        from rapid_llm.decoder import RapidDecoder
        from rapid_llm.pipeline import RapidPipeline

        if compare or method != "lc":
            require_retrieval(retrieval)
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
    status_of_all = 0
    if batch is not None:
        jobs = [job(question.text) for question in batch]
        status_of_all = print_answers(batch, _answers(pipeline, jobs, method, compare, results))
    elif question is None:
        converse(pipeline, read, method, bars)
    elif as_json:
        print(json.dumps(_as_json(job(question), method, compare, results)), flush=True)
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
    try:
        return replace(sampling, constraint={"json": text})
    except InvalidParameterError as error:
        reason = str(error).removeprefix("constraint: ")
        raise InvalidParameterError(f"--schema {path}: {reason}") from error


def _check_question(
    documents: Sequence[str], question: str | None, questions: str | None, at_once: bool
) -> None:
    """Validate the source of questions.

    Args:
        documents: names of the documents.
        question, questions: values of the options.
        at_once: whether the requested output needs a question on the command line or in a file.

    Raises:
        DocumentError: the question is empty.
        InvalidParameterError: there is no question, there are two sources of questions, or
            standard input would be read twice.
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


def _answers(
    pipeline: RapidPipeline,
    jobs: Sequence[Job],
    method: Method,
    compare: bool,
    results: list[GenerationResult],
) -> Iterator[dict[str, Any] | Exception]:
    """Objects to print, or errors; all questions at once by one method, else one by one.

    Args:
        pipeline: the pipeline.
        jobs: the questions.
        method: method of the answers.
        compare: whether every method answers.
        results: list to which the answers are added.
    """
    if compare:
        for job in jobs:
            try:
                outcome: dict[str, Any] | Exception = _as_json(job, method, compare, results)
            except RapidError as error:
                outcome = error
            yield outcome
        return
    texts = [job.question for job in jobs]
    answers = pipeline.answers(texts, method, return_exceptions=True)
    for job, answer in zip(jobs, answers, strict=True):
        if isinstance(answer, Exception):
            yield answer
        else:
            note_unread(answer.stats)
            results.append(answer)
            yield job.as_dict(method, answer)


def _as_json(
    job: Job, method: Method, compare: bool, results: list[GenerationResult]
) -> dict[str, Any]:
    """The object to print of an answer, or of all methods' answers, which are added to a list."""
    answers = job.compare() if compare else {method: job.answer(method)}
    note_unread(answers["rapid" if compare else method].stats)
    results += answers.values()
    objects = [job.as_dict(each, result) for each, result in answers.items()]
    return {"results": objects} if compare else objects[0]


def _compare(job: Job) -> Collection[GenerationResult]:
    results = job.compare()
    stats = results["rapid"].stats
    show(comparison(results))
    show(names(job.models("rapid", stats)), stderr=True)
    note_unread(stats)
    return results.values()
