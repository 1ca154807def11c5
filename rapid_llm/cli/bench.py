"""``rapid-llm bench``: speed of every method, or of a model's shape."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rapid_llm.cli.app import app
from rapid_llm.cli.demo import demo_text
from rapid_llm.config import PACKAGED_MODEL
from rapid_llm.console import Bars, Dtype, status
from rapid_llm.errors import InvalidParameterError
from rapid_llm.figure import new_figure

if TYPE_CHECKING:
    from rapid_llm.bench.harness import Bench


@app.command()
def bench(
    context: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Tokens of the prompt; may be repeated.",
            show_default="1700, 7500; with --shape 32768",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Hub id, folder, GGUF file or the packaged model.", show_default=PACKAGED_MODEL
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="quoting or free; may be repeated.", show_default="both"),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or part of the name of a method to measure; may be repeated.",
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens decoded in each run.", show_default="64")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Counted runs of each method.", show_default="3")
    ] = None,
    questions: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Number of questions on one document at once, to measure as well; may be "
            "repeated, the first is what the others are compared with.",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Shape of a model with random weights (a name that plan knows, or tiny): measures "
            "the engine on this device without a model or text."
        ),
    ] = None,
    acceptance: Annotated[
        list[float] | None,
        typer.Option(
            help="With --shape, simulated probability that a drafted token is accepted; may be "
            "repeated.",
            show_default="0.8, 0.9, 0.95",
        ),
    ] = None,
    seconds: Annotated[
        int | None,
        typer.Option(min=1, help="With --shape, time limit in seconds.", show_default="180"),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Data type of the model.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    save: Annotated[
        Path | None,
        typer.Option(
            help="File (.json) or folder for the JSON object and the printed tables.",
            metavar="PATH",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Image file for a bar chart of the speeds.", metavar="PNG")
    ] = None,
) -> None:
    """Compare the speed of every method with transformers, or measure the engine alone (--shape).

    Contexts longer than the model's window are read with a YaRN-scaled rotary embedding, which
    serves to measure speed only.
    """
    shown = sys.stderr.isatty() and not as_json
    if shape is not None:
        _refuse("--shape reads no text", model=model, task=task, method=method,
                new_tokens=new_tokens, repeats=repeats)  # fmt: skip
    else:
        _refuse("without --shape nothing is simulated", acceptance=acceptance, seconds=seconds)
    with status(f"loading {shape or model or PACKAGED_MODEL}", shown):
        from rapid_llm.bench.shape_bench import ShapeBench

        if shape is not None:
            contexts, coins = context or [32_768], acceptance or [0.8, 0.9, 0.95]
            made: Bench = ShapeBench(shape, contexts, coins, dtype, seconds or 180, questions or ())
        else:
            made = _method_bench(
                model or PACKAGED_MODEL, context or [1700, 7500], task, method, dtype,
                new_tokens=new_tokens or 64, repeats=repeats or 3, questions=questions or (),
            )  # fmt: skip
    raise typer.Exit(_measure(made, as_json, save, plot, shown))


def _method_bench(
    source: str,
    contexts: Sequence[int],
    tasks: Sequence[str] | None,
    parts: Sequence[str] | None,
    dtype: str,
    *,
    new_tokens: int,
    repeats: int,
    questions: Sequence[int],
) -> Bench:
    """Bench of a model and the methods named in ``parts``, by full name or a part of it."""
    from rapid_llm.bench import method_bench as comparing
    from rapid_llm.bench.workload import QUESTIONS, make_workload, require_task
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.models import load_model, packaged_model
    from rapid_llm.shared_weights import stretched

    for task in tasks or ():
        require_task(task)
    for part in parts or ():
        comparing.named(part)
    loaded = load_model(source, dtype=dtype)
    works = [
        make_workload(task, tokens, demo_text(), loaded.tokenizer)
        for tokens in contexts
        for task in tasks or QUESTIONS
    ]
    model = stretched(loaded.model, max(contexts) + max(new_tokens, comparing.ROOM))
    decoder = RapidDecoder(model, loaded.tokenizer, name=loaded.name)
    path = packaged_model() if source == PACKAGED_MODEL else Path(source)
    ours = comparing.our_methods(decoder)
    peers = comparing.peer_methods(decoder, path if path.suffix == ".gguf" else None)
    every = [*ours, *peers]
    chosen = {name for part in parts or [""] for name in comparing.named(part, every)}
    ours, peers = ({k: v for k, v in rows.items() if k in chosen} for rows in (ours, peers))
    return comparing.MethodBench(
        decoder, ours, works, peers=peers, new_tokens=new_tokens, repeats=repeats,
        questions=questions,
    )  # fmt: skip


def _measure(made: Bench, as_json: bool, save: Path | None, plot: Path | None, shown: bool) -> int:
    """Measure and print; returns 1 if a section failed, else 0.

    The saved files are rewritten after each section, so that an interrupt loses one section only.
    """
    if plot is not None:
        new_figure("--plot needs", 1, 1)  # fails before minutes of measuring, not after
    bars = made.progress = Bars(shown)
    sections = made.run()
    if not as_json:
        print(made.report.heading(), flush=True)
    while True:
        with bars:
            section = next(sections, None)
        if section is None:
            break
        if not as_json:
            print(section.text(), flush=True)
        if save is not None:
            made.report.save(save)
    if as_json:
        print(json.dumps(made.report.as_dict()), flush=True)
    if plot is not None:
        made.report.plot(plot)
    return int(made.report.failed)


def _refuse(why: str, **options: object) -> None:
    """Raises InvalidParameterError for the first option that was given."""
    for name, value in options.items():
        if value is not None:
            raise InvalidParameterError(
                f"--{name.replace('_', '-')}={value} has no use here, as {why}; leave it out"
            )
