"""``rapid-llm plan``: speed and memory predicted from a model's config."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from rapid_llm.bench.speed_model import ACCEPTANCE, DEVICES, named_device
from rapid_llm.cli.app import app
from rapid_llm.config import PACKAGED_MODEL
from rapid_llm.console import show, status


@app.command()
def plan(
    context: Annotated[
        int, typer.Option(min=1, help="Tokens the target reads.", show_default=False)
    ],
    model: Annotated[
        str, typer.Option(help="Hub id, folder, GGUF file or the packaged model.")
    ] = PACKAGED_MODEL,
    drafter: Annotated[
        str | None, typer.Option(help="The same: a smaller or larger model to draft with.")
    ] = None,
    retrieval_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens the drafter reads; by default 4,096, or 1/24 if more."),
    ] = None,
    acceptance: Annotated[
        float, typer.Option(min=0, max=1, help="Probability that a draft token is accepted.")
    ] = ACCEPTANCE,
    device: Annotated[
        str, typer.Option(help=f"{', '.join(DEVICES)}; or this, which is measured.")
    ] = "this",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict speed and memory from a model's config alone; no weights are loaded."""
    known = None if device == "this" else named_device(device)
    with status(f"sizing {model}", sys.stderr.isatty() and not as_json):
        from rapid_llm.bench import plan as planning

        made = planning.make_plan(
            model,
            context,
            retrieval_tokens=retrieval_tokens,
            drafter=drafter,
            acceptance=acceptance,
            device=known,
        )
    if as_json:
        print(json.dumps(made.as_dict()), flush=True)
        return
    show(planning.heading(made))
    for table in planning.tables(made):
        show(table)
    for warning in made.warnings:
        show(f"Warning: {warning}.")
    show("Assumed:")
    for assumption in made.assumptions:
        show(f"- {assumption}.")
