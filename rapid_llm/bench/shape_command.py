"""``rapid-llm bench --shape``: what is printed and saved, a section at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rapid_llm.bench import shape_report as reporting
from rapid_llm.bench.shape_bench import ShapeBench, ShapeReport
from rapid_llm.console import Dtype, status
from rapid_llm.models import resolve_device

_WIDTH = 120


def bench_shape(
    shape: str,
    contexts: Sequence[int],
    acceptances: Sequence[float],
    *,
    dtype: Dtype,
    seconds: float,
    as_json: bool,
    save: Path | None,
    plot: Path | None,
    shown: bool,
) -> int:
    """Measure and print; 1 if a section failed, else 0.

    What is saved is written anew after each section, so that an end that comes too soon loses no
    more than the section that it comes in.

    Raises:
        InvalidParameterError: see :class:`ShapeBench`.
        MissingDependencyError: ``plot`` without matplotlib.
    """
    if plot is not None:
        reporting.require_plots()  # before it takes minutes
    chosen = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
    with status(f"making {shape}", shown):
        bench = ShapeBench(shape, contexts, acceptances, chosen, resolve_device(None), seconds)
    texts: list[str] = []

    def tell(what: str | Table) -> None:
        texts.append(_as_text(what))
        if not as_json:
            print(texts[-1], flush=True)
        if save is not None:
            _write(bench.report, texts, save)

    tell(reporting.heading(bench.report))
    for section in bench.run():
        tell(reporting.section_table(section))
    tell(f"{bench.report.seconds:.0f} s in all")
    if as_json:
        print(json.dumps(bench.report.as_dict()), flush=True)
    if plot is not None:
        reporting.plot(bench.report, plot)
    return int(bench.report.failed)


def _as_text(what: str | Table) -> str:
    file = StringIO()
    Console(file=file, width=_WIDTH, markup=False, highlight=False).print(what)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _write(report: ShapeReport, texts: Sequence[str], folder: Path) -> None:
    path = folder / f"{report.shape}.json"
    path.write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
