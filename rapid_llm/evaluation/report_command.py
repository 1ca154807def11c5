"""The command ``rapid-llm report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR",
            help="Folders that rapid-llm eval wrote, or one that holds such folders.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where to write; by default into the first DIR.", show_default=False
        ),
    ] = None,
) -> None:
    """Make report.md and its plots from what rapid-llm eval wrote."""
    from rapid_llm.evaluation.report import write_report
    from rapid_llm.evaluation.runs import read_runs

    print(write_report(read_runs(folders), out or folders[0]))
