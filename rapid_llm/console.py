"""Console output shared by the commands: tables, status lines and progress bars."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from io import StringIO
from typing import Any, ClassVar, Literal

from rich.box import SIMPLE_HEAD, Box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

Dtype = Literal["auto", "bfloat16", "float16", "float32"]

_FILE_WIDTH = 110  # width in characters of a table that is not printed on a terminal


def show(what: str | Table, *, stderr: bool = False) -> None:
    """Print a line or a table, as wide as the terminal, or of a fixed width in a file."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else _FILE_WIDTH
    console = Console(stderr=stderr, markup=False, highlight=False, width=width)
    console.print(what, soft_wrap=isinstance(what, str))


def number_table(
    first: str, others: Sequence[str], *, box: Box = SIMPLE_HEAD, **options: Any
) -> Table:
    """An empty table with a column of names and right-aligned columns of numbers.

    Args:
        first: heading of the column of names.
        others: headings of the columns of numbers.
        box: lines of the table.
        options: other options of rich's ``Table``.
    """
    table = Table(box=box, **options)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def as_text(what: str | Table, width: int) -> str:
    """Plain text of a line or a table, ``width`` columns wide, without trailing blanks."""
    file = StringIO()
    Console(file=file, width=width, markup=False, highlight=False).print(what)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def status(text: str, shown: bool) -> AbstractContextManager[object]:
    """Context with a spinner and a text on stderr, if ``shown``."""
    return Console(stderr=True).status(text) if shown else nullcontext()


class Bars:
    """Progress bars on stderr, shown only within ``with bars:``."""

    _LABELS: ClassVar = {
        "embed": "chunks embedded",
        "draft": "tokens read by the drafter",
        "target": "tokens read by the target",
    }

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._progress is None:
            return
        if stage not in self._tasks:
            label = self._LABELS.get(stage, stage)
            self._tasks[stage] = self._progress.add_task(label, total=total)
        self._progress.update(self._tasks[stage], completed=done)

    def __enter__(self) -> None:
        if self._shown:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._progress.start()

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._tasks = None, {}
