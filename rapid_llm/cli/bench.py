"""``rapid-llm bench``: speed of every method, or of a model's shape."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from rapid_llm.bench.report import Report, Row, Section
from rapid_llm.cli.app import app
from rapid_llm.cli.demo import demo_text
from rapid_llm.config import PACKAGED_MODEL
from rapid_llm.console import Bars, Dtype, as_text, number_table, status
from rapid_llm.errors import InvalidParameterError
from rapid_llm.figure import draw_bars, new_figure

if TYPE_CHECKING:
    from rapid_llm.bench.base import Bench

_WIDTH = 132
_DRAWN = ("tokens/s", "ms/token", "ms")  # units of the bar charts


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
            help="Number of questions on one document at once, to measure as well (with --shape "
            "at the longest context); may be repeated, the first is what the others are compared "
            "with.",
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
    from rapid_llm.bench.workload import QUESTIONS, make_workload
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.models import load_model, packaged_model
    from rapid_llm.shared_weights import stretched

    for task in tasks or ():
        if task not in QUESTIONS:
            raise InvalidParameterError(
                f"task={task!r} is unknown; choose one of {', '.join(QUESTIONS)}"
            )
    for part in parts or ():
        _named(part, comparing.NAMES)
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
    chosen = {name for part in parts or [""] for name in _named(part, every)}
    ours, peers = ({k: v for k, v in rows.items() if k in chosen} for rows in (ours, peers))
    return comparing.MethodBench(
        decoder, ours, works, peers=peers, new_tokens=new_tokens, repeats=repeats,
        questions=questions,
    )  # fmt: skip


def _named(part: str, names: Sequence[str]) -> list[str]:
    """The method of that name, or all whose names contain it.

    Raises:
        InvalidParameterError: there is none.
    """
    found = [part] if part in names else [name for name in names if part in name]
    if not found:
        raise InvalidParameterError(
            f"method={part!r} names no method; choose from {', '.join(names)}"
        )
    return found


def _measure(made: Bench, as_json: bool, save: Path | None, plot: Path | None, shown: bool) -> int:
    """Measure and print; returns 1 if a section failed, else 0.

    The saved files are rewritten after each section, so that an interrupt loses one section only.
    """
    if plot is not None:
        new_figure("--plot needs", 1, 1)  # fails before minutes of measuring, not after
    bars = made.progress = Bars(shown)
    sections = made.run()
    if not as_json:
        print(heading(made.report), flush=True)
    while True:
        with bars:
            section = next(sections, None)
        if section is None:
            break
        if not as_json:
            print(section_text(section), flush=True)
        if save is not None:
            write(made.report, save)
    if as_json:
        print(json.dumps(made.report.as_dict()), flush=True)
    if plot is not None:
        draw(made.report, plot)
    return int(made.report.failed)


def _refuse(why: str, **options: object) -> None:
    """Raises InvalidParameterError for the first option that was given."""
    for name, value in options.items():
        if value is not None:
            raise InvalidParameterError(
                f"--{name.replace('_', '-')}={value} has no use here, as {why}; leave it out"
            )


def heading(report: Report) -> str:
    """The facts, in one line."""
    return as_text("; ".join(f"{name}: {fact}" for name, fact in report.facts.items()), _WIDTH)


def section_text(section: Section) -> str:
    """The rows as a table, followed by the failure if there was one."""
    columns = list(dict.fromkeys(name for row in section.rows for name in row.columns))
    failed = f"failed: {section.failed}" if section.failed else None
    table = number_table(
        "", ("", "", *columns), title=f"{_title(section)} ({section.seconds:.0f} s)",
        title_justify="left", caption=failed, caption_justify="left", show_header=bool(columns),
    )  # fmt: skip
    table.columns[0].no_wrap = True
    table.add_column("")  # of notes
    for row in section.rows:
        value = "–" if row.median is None else f"{_number(row.median)} {row.unit}".rstrip()
        ends = min(row.samples, default=0), max(row.samples, default=0)
        spread = f"({'–'.join(map(_number, ends))})" if len(row.samples) > 1 else ""
        others = [_number(row.columns[c]) if c in row.columns else "–" for c in columns]
        table.add_row(Text(_name(row)), value, spread, *others, Text(row.note))
    return as_text(table, _WIDTH)


def write(report: Report, path: Path) -> None:
    """Write the results as JSON, and as printed text next to it.

    Args:
        report: the results.
        path: file ``*.json``, or folder for ``NAME.json``.
    """
    path = path if path.suffix == ".json" else path / f"{report.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    texts = [heading(report), *map(section_text, report.sections)]
    path.with_suffix(".txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


def draw(report: Report, path: Path) -> None:
    """Draw a bar chart with a panel per section and unit, and one for all times per token.

    Args:
        report: the results.
        path: image file to write.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    panels: dict[str, dict[str, list[float]]] = {}
    for section in report.sections:
        for row in section.rows:
            if row.samples and row.unit in _DRAWN:
                shared = f"decoding, {section.context or 0:,} tokens"
                title = shared if row.unit == "ms/token" else _title(section)
                panels.setdefault(f"{title}: {row.unit}", {})[_name(row)] = row.samples
    draw_bars(path, panels)


def _title(section: Section) -> str:
    """Name and context length."""
    context = section.context
    return section.name if context is None else f"{section.name}, {context:,} tokens"


def _name(row: Row) -> str:
    """The label, marked with ``*`` if the row is simulated."""
    return f"{row.label} *" if row.simulated else row.label


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if value else "0"
