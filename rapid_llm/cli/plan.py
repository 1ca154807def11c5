"""``rapid-llm plan``: speed and memory predicted from a model's config."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from rapid_llm.bench.speed_model import (
    ACCEPTANCE,
    DEVICES,
    Device,
    described_device,
    named_device,
)
from rapid_llm.cli.app import app
from rapid_llm.config import PACKAGED_MODEL
from rapid_llm.console import number_table, show, status
from rapid_llm.errors import InvalidParameterError

if TYPE_CHECKING:
    from rapid_llm.bench.plan import Plan


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
        str | None,
        typer.Option(
            help=f"{', '.join(DEVICES)}; or this, which is measured.", show_default="this"
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            metavar="GB/s",
            help="Memory bandwidth of another GPU; needs --tflops.",
            show_default=False,
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(help="Its dense bfloat16 throughput, in TFLOP/s.", show_default=False),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GB", help="Its memory.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict speed and memory from a model's config alone; no weights are loaded."""
    known = _device(device, bandwidth, tflops, memory)
    with status(f"sizing {model}", sys.stderr.isatty() and not as_json):
        from rapid_llm.bench.plan import make_plan

        made = make_plan(
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
    show(heading(made))
    for table in tables(made):
        show(table)
    for warning in made.warnings:
        show(f"Warning: {warning}.")
    show("Assumed:")
    for assumption in made.assumptions:
        show(f"- {assumption}.")


def _device(
    name: str | None, bandwidth: float | None, tflops: float | None, memory: float | None
) -> Device | None:
    """The device that was named or described; None is this machine."""
    if bandwidth is tflops is memory is None:
        return None if name in (None, "this") else named_device(name)
    if name is not None:
        raise InvalidParameterError(
            f"--device {name} has its own numbers: give it, or --bandwidth, --tflops and --memory"
        )
    if bandwidth is None or tflops is None:
        raise InvalidParameterError(
            "another device needs --bandwidth and --tflops, from its data sheet"
        )
    return described_device(bandwidth, tflops, memory)


def heading(made: Plan) -> str:
    """The model, how much of it there is, and where and on what it would run."""
    size = made.model
    active = f", {_count(size.active_parameters)} active" if size.experts else ""
    return (
        f"{size.name} ({_count(size.parameters)} parameters{active}), {made.device.name}: "
        f"{made.context:,} tokens, {made.retrieval_tokens:,} retrieved, acceptance rate "
        f"{made.acceptance:g}"
    )


def tables(made: Plan) -> tuple[Table, Table, Table]:
    """A line a drafter: what it gains, also at other acceptance rates, and the memory it takes."""
    memory = "unknown" if made.device.memory is None else f"{made.device.memory / 1e9:.0f} GB"
    columns = "c", "γ", "tokens\na round", "ms\na token", "speedup", "prefill\ns"
    rates = [f"{acceptance:g}" for acceptance in made.rows[-1].sensitivity]
    speed = number_table("drafter", columns)
    others = number_table("speedup (γ) at a =", rates)
    needed = number_table("memory, GB", ("weights", "KV", "all", f"fits ({memory})"))
    for row in made.rows:
        name = row.drafter or "none (plain)"
        cost = "–" if row.cost is None else f"{row.cost:.2f}"
        numbers = row.tokens_a_round, 1000 * row.seconds_a_token
        gains = *(f"{n:.1f}" for n in numbers), f"{row.best.speedup:.2f}"
        speed.add_row(name, cost, str(row.best.gamma), *gains, f"{row.prefill_seconds:.1f}")
        if row.drafter is not None:
            best = (f"{each.speedup:.2f} ({each.gamma})" for each in row.sensitivity.values())
            others.add_row(name, *best)
        parts = row.weight_bytes, row.kv_bytes, row.weight_bytes + row.kv_bytes
        fits = {True: "yes", False: "no", None: "?"}[row.fits]
        needed.add_row(name, *(f"{part / 1e9:.2f}" for part in parts), fits)
    return speed, others, needed


def _count(parameters: float) -> str:
    billions = parameters / 1e9
    return f"{billions:.2f}B" if billions >= 1 else f"{1000 * billions:.1f}M"
