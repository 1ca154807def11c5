"""``rapid-llm bench``: speed of every method, or of a model's shape."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from rapid_llm.cli.app import app
from rapid_llm.cli.demo import demo_text
from rapid_llm.config import PACKAGED_EMBEDDER, PACKAGED_MODEL
from rapid_llm.console import Bars, Dtype, show, status
from rapid_llm.errors import InvalidParameterError


@app.command()
def bench(
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens of the prompt; may be repeated. [default: 1700, 7500]"),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="quoting or free; may be repeated. [default: both]", show_default=False),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Only the method of this name, or all whose names contain it; may be repeated.",
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens decoded in a run. [default: 64]")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Counted runs of each. [default: 3]")
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights of this shape (llama-3.1-8b, qwen2.5-7b, …, tiny) in the place of "
            "the packaged models, and no text: what the engine does on this device."
        ),
    ] = None,
    acceptance: Annotated[
        list[float] | None,
        typer.Option(
            help="With --shape: how likely a drafted token is accepted, by the throw of a coin; "
            "may be repeated. [default: 0.8, 0.9, 0.95]"
        ),
    ] = None,
    seconds: Annotated[
        int | None,
        typer.Option(min=1, help="With --shape: stop measuring after so long. [default: 180]"),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the model.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write that object to this file as well; with --shape to this folder, beside what "
            "is printed.",
            metavar="PATH",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the speeds as bars.", metavar="PNG")
    ] = None,
) -> None:
    """Time every method beside transformers' own decoding, on the packaged models.

    Contexts longer than the model's window are read with a YaRN-scaled rotary embedding, which is
    good for measuring speed and for nothing else.
    """
    shown = sys.stderr.isatty() and not as_json
    if shape is not None:
        _refuse("--shape reads no text", task=task, method=method, new_tokens=new_tokens,
                repeats=repeats)  # fmt: skip
        from rapid_llm.bench.shape_command import bench_shape

        failed = bench_shape(
            shape,
            context or [32_768],
            acceptance or [0.8, 0.9, 0.95],
            dtype=dtype,
            seconds=seconds or 180,
            as_json=as_json,
            save=save,
            plot=plot,
            shown=shown,
        )
        raise typer.Exit(failed)
    _refuse("without --shape nothing is simulated", acceptance=acceptance, seconds=seconds)
    contexts, new_tokens, repeats = context or [1700, 7500], new_tokens or 64, repeats or 3
    with status(f"loading {PACKAGED_MODEL}", shown):
        from rapid_llm.bench import report as reporting
        from rapid_llm.bench.measure import measure
        from rapid_llm.bench.methods import our_methods, peer_methods
        from rapid_llm.bench.workload import QUESTIONS, make_builder, make_workload, stretched
        from rapid_llm.decoder import RapidDecoder
        from rapid_llm.models import load_model

        loaded = load_model(PACKAGED_MODEL, dtype=dtype)
        model = stretched(loaded.model, max(contexts) + new_tokens)
        decoder = RapidDecoder(model, loaded.tokenizer, name=loaded.name)
        builder = make_builder(loaded.tokenizer, PACKAGED_EMBEDDER, max(contexts))
        works = [
            make_workload(one, tokens, demo_text(), loaded.tokenizer, builder)
            for tokens in contexts
            for one in (task or QUESTIONS)
        ]
        ours, peers = our_methods(decoder), peer_methods(decoder)
        every = ours | peers
        chosen = {
            name
            for part in method or [""]
            for name in ([part] if part in every else every)
            if part in name
        }
        if not chosen:
            raise InvalidParameterError(
                f"method={method!r} names no method; choose from {', '.join(every)}"
            )
    bars = Bars(shown)
    with bars:
        report = measure(
            decoder,
            {name: run for name, run in ours.items() if name in chosen},
            works,
            peers={name: run for name, run in peers.items() if name in chosen},
            new_tokens=new_tokens,
            repeats=repeats,
            progress=lambda done, total: bars("runs measured", done, total),
        )
    as_object = json.dumps(report.as_dict())
    if save is not None:
        save.write_text(as_object + "\n", encoding="utf-8")
    if plot is not None:
        reporting.plot(report, plot)
    if as_json:
        print(as_object, flush=True)
        return
    show(reporting.heading(report))
    for cell in report.cells:
        show(reporting.cell_table(cell))
    for line in reporting.engine_lines(report):
        show(line)


def _refuse(why: str, **options: object) -> None:
    """Raises InvalidParameterError for the first option that was given."""
    for name, value in options.items():
        if value is not None:
            raise InvalidParameterError(
                f"--{name.replace('_', '-')}={value} has no use here, as {why}; leave it out"
            )
