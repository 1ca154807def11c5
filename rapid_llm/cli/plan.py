"""``rapid-llm plan``: predicted speed and memory of a model, from its config."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from rapid_llm.bench.speed_model import (
    ACCEPTANCE,
    DEVICES,
    MEMORY_FRACTION,
    Device,
    described_device,
    named_device,
)
from rapid_llm.cli.app import app
from rapid_llm.config import PACKAGED_MODEL
from rapid_llm.console import number_table, show, status
from rapid_llm.errors import InvalidParameterError

if TYPE_CHECKING:
    from rapid_llm.bench.plan import Plan, Row

PAPER_PAIRS = (
    ("llama-3.1-8b", None),
    ("llama-3.1-70b", None),
    ("llama-3.1-8b", "llama-3.1-70b"),
    ("qwen2.5-7b", None),
    ("qwen2.5-72b", None),
    ("qwen2.5-7b", "qwen2.5-72b"),
)
"""Target and drafter of the paper's rows (arXiv 2502.20330, table 1); None drafts for itself."""


@app.command()
def plan(
    context: Annotated[
        int, typer.Option(min=1, help="Tokens that the target reads.", show_default=False)
    ],
    model: Annotated[
        str,
        typer.Option(
            help="Hub id, folder, GGUF file, the packaged model, or a name such as llama-3.1-70b. "
            "Llama 3.1 to 3.3, Qwen2.5, Qwen3, Mistral, Gemma 3 and Phi-4 need no hub."
        ),
    ] = PACKAGED_MODEL,
    drafter: Annotated[
        str | None, typer.Option(help="Another model to draft with, named like the model.")
    ] = None,
    retrieval_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that the drafter reads; by default 4,096 or L/24."),
    ] = None,
    acceptance: Annotated[
        float, typer.Option(min=0, max=1, help="Probability that a draft token is accepted.")
    ] = ACCEPTANCE,
    device: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(DEVICES)}, or this (measured).", show_default="this"),
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
        typer.Option(help="Dense bfloat16 throughput of that GPU.", show_default=False),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GB", help="Memory of that GPU.", show_default=False)
    ] = None,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Show memory on 1 to 8 devices for the paper's models."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict speed and memory from a model's config alone; no weights are loaded."""
    known = _device(device, bandwidth, tflops, memory)
    if paper:
        _paper(context, known, as_json)
        return
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
        print(json.dumps(as_dict(made)), flush=True)
        return
    show(heading(made))
    for table in tables(made):
        show(table)
    show(kept(made))
    for warning in warnings(made):
        show(f"Warning: {warning}.")
    show("Assumed:")
    for assumption in assumptions(made):
        show(f"- {assumption}.")


def _paper(context: int, device: Device | None, as_json: bool) -> None:
    if device is None:
        raise InvalidParameterError("--paper needs a GPU: give --device, as in --device h100")
    plans = paper_plans(context, device)
    if as_json:
        print(json.dumps({"plans": [as_dict(plan) for plan in plans]}), flush=True)
        return
    show(f"{device.name}: {context:,} tokens, {plans[0].retrieval_tokens:,} retrieved")
    show(spread_table({paper_name(plan): plan.rows[-1 if plan.drafter else 1] for plan in plans}))


def paper_plans(context: int, device: Device) -> list[Plan]:
    """Plans of the paper's pairs of models for a context of ``context`` tokens.

    Raises:
        InvalidParameterError: the context is out of range.
    """
    from rapid_llm.bench.plan import make_plan

    return [
        make_plan(model, context, drafter=drafter, device=device) for model, drafter in PAPER_PAIRS
    ]


def paper_name(plan: Plan) -> str:
    """Names of target and drafter in the style of the paper's tables."""
    return f"{plan.model.name} ← {plan.drafter.name}" if plan.drafter else f"{plan.model.name} self"


def spread_table(rows: Mapping[str, Row]) -> Table:
    """Table of the memory on the fullest of several devices, by device map and tensor parallel."""
    counts = [each.devices for each in max((row.spreads for row in rows.values()), key=len)]
    table = number_table(
        "GB a device, of",
        list(map(str, counts)),
        caption="map: layers in turn, by device_map; TP: tensor parallel, by torchrun",
    )
    for name, row in rows.items():
        found = {each.devices: each for each in row.spreads}
        mapped = {n: _cell(each.mapped, each.mapped_fits) for n, each in found.items()}
        sharded = {n: _cell(each.sharded, each.sharded_fits) for n, each in found.items() if n > 1}
        table.add_row(f"{name}, map", *(mapped.get(n, "–") for n in counts))
        if sharded:
            table.add_row(f"{name}, TP", *(sharded.get(n, "" if n == 1 else "–") for n in counts))
    return table


def _cell(nbytes: int | None, fits: bool | None) -> str:
    if nbytes is None:
        return "–"
    return f"{nbytes / 1e9:.1f} {'' if fits is None else 'yes' if fits else 'no'}".rstrip()


def kept(made: Plan) -> str:
    """Number of documents whose KV each tier keeps, and the time to restore one, in a sentence."""
    size = made.model.kv_bytes_per_token * made.context
    parts = [
        f"{tier.documents:,} in {tier.nbytes / 1e9:,.0f} GB of the {tier.name}"
        + (f" (back in {tier.seconds:.2f} s)" if tier.seconds else "")
        for tier in made.tiers
    ]
    return f"A document's KV has {size / 1e9:.2f} GB; kept are {', '.join(parts)}."


def _device(
    name: str | None, bandwidth: float | None, tflops: float | None, memory: float | None
) -> Device | None:
    """The device that the options name or describe; None for this machine."""
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
    """Model, number of parameters, device and context, in one line."""
    size = made.model
    active = f", {_count(size.active_parameters)} active" if size.experts else ""
    return (
        f"{size.name} ({_count(size.parameters)} parameters{active}), {made.device.name}: "
        f"{made.context:,} tokens, {made.retrieval_tokens:,} retrieved, acceptance rate "
        f"{made.acceptance:g}"
    )


def tables(made: Plan) -> tuple[Table, ...]:
    """Tables with a row per drafter: speed, speedup by acceptance rate, memory, several devices."""
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
    spread = spread_table({row.drafter or "none (plain)": row for row in made.rows})
    return speed, others, needed, spread


def as_dict(made: Plan) -> dict[str, Any]:
    """Every field and prediction, ready for JSON."""
    return asdict(made) | {
        "rows": [asdict(row) for row in made.rows],
        "tiers": [asdict(tier) for tier in made.tiers],
        "warnings": warnings(made),
        "assumptions": assumptions(made),
    }


def warnings(made: Plan) -> list[str]:
    """Warnings about prompts longer than a model's context window."""
    reads = [(made.model, made.context), (made.drafter, made.retrieval_tokens)]
    return [
        f"{size.name} was made for {size.context_window:,} tokens, fewer than the {tokens:,} it "
        "would read"
        for size, tokens in reads
        if size is not None and tokens > size.context_window
    ]


def assumptions(made: Plan) -> list[str]:
    """Assumptions of the predictions, in sentences."""
    from rapid_llm.speculation.schedule import MAX_GAMMA

    device = made.device
    return [
        f"{device.name}, {device.source}: weights are read at {device.bandwidth / 1e9:,.1f} GB/s, "
        f"KV at {device.kv_bandwidth / 1e9:,.1f}; {device.flops / 1e12:,.2f} TFLOP/s in a prefill, "
        f"{device.pass_flops / 1e12:,.2f} in passes of few tokens; beside, "
        f"{device.layer_seconds * 1e6:.0f} µs a layer, {device.round_seconds * 1e3:.2f} ms a round",
        f"target and KV in {device.dtype}, batch 1; every layer reads its whole cache in every "
        "step",
        "each draft token is accepted with the same probability if those before it were; "
        f"γ is the best of 0 to {MAX_GAMMA}",
        "a drafter of few bits comes beside the target's own weights; a CPU takes int8 (int4 "
        "where the checkpoint has 4 bits), which it reads as fast as bf16, CUDA int4 from "
        "Ampere on",
        f"fits: weights and KV take at most {MEMORY_FRACTION:.0%} of the memory",
        "on several devices: what the fullest of equal ones holds. With a device map they take "
        "turns, so that a token takes what it takes on one; tensor parallel is not timed here",
        "kept KV: a device's is a quarter of its memory; it comes back from the host at 55 "
        "GB/s, which an H100 reached, and from disk at 3 GB/s, which is assumed",
    ]


def _count(parameters: float) -> str:
    billions = parameters / 1e9
    return f"{billions:.2f}B" if billions >= 1 else f"{1000 * billions:.1f}M"
