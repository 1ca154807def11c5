"""``rapid-llm ask``: answers to questions about documents."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from rapid_llm.cli.answers import Job, comparison, names, unread
from rapid_llm.cli.app import app
from rapid_llm.cli.options import with_options
from rapid_llm.config import EngineConfig, RetrievalConfig, SamplingParams, SpeculationConfig
from rapid_llm.console import Bars, show, status
from rapid_llm.errors import DocumentError
from rapid_llm.stats import Method


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
            help="Text, Markdown, HTML or PDF files, read in this order; - is standard input.",
            show_default=False,
        ),
    ],
    question: Annotated[
        str, typer.Option("--question", "-q", help="What to answer.", show_default=False)
    ],
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
) -> None:
    """Answer a question about documents."""
    if not question.strip():
        raise DocumentError("the question is empty; give one with --question")
    texts = read_documents(documents)
    shown = sys.stderr.isatty() and not as_json
    drafter = f" and {engine.drafter}" if engine.drafter else ""
    with status(f"loading {engine.model}{drafter}", shown):
        from rapid_llm.decoder import RapidDecoder
        from rapid_llm.pipeline import RapidPipeline

        pipeline = RapidPipeline(
            RapidDecoder.from_config(engine),
            texts.values(),
            retrieval=retrieval,
            sampling=sampling,
            speculation=speculation,
        )
    job = Job(pipeline, question, list(texts), Bars(shown))
    if compare:
        results = job.compare()
        if as_json:
            objects = [job.as_dict(method, result) for method, result in results.items()]
            print(json.dumps({"results": objects}), flush=True)
        else:
            show(comparison(results))
            show(names(job.models("rapid", results["rapid"].stats)), stderr=True)
        stats = results["rapid"].stats
    elif as_json:
        result = job.answer(method)
        print(json.dumps(job.as_dict(method, result)), flush=True)
        stats = result.stats
    else:
        result = job.stream(method)
        stats = result.stats
        if not unread(stats):
            show(job.summary(method, result), stderr=True)
    if unread(stats):
        show(
            f"Nothing was retrieved ({stats.draft_skipped}), so nothing was read: lower "
            "--threshold, or have the whole documents read with --on-empty read_all.",
            stderr=True,
        )


def read_documents(names: Sequence[str]) -> dict[str, str]:
    """The documents' texts by name; blank ones among others are passed over, with a note."""
    from rapid_llm.context.documents import read_document

    with warnings.catch_warnings(record=True) as guessed:
        warnings.simplefilter("always")
        read = {name: read_document(name, may_be_blank=len(names) > 1) for name in names}
    for warning in guessed:
        show(f"Warning: {warning.message}", stderr=True)
    texts = {name: text for name, text in read.items() if text.strip()}
    if not texts:
        raise DocumentError(f"{', '.join(read)} hold no text: give a file that is not empty")
    for name in read.keys() - texts.keys():
        show(f"{name} holds no text and is passed over", stderr=True)
    return texts
