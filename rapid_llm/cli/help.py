"""Help texts that show every option in full, however narrow the terminal."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

from rapid_llm.cli.flags import applications, with_flags


class Application(typer.Typer):
    """An application whose commands show their options by group, as plain text.

    typer's own tables give each kind of name a column, and cut names where those do not fit.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(rich_markup_mode=None, **settings)
        applications.append(self)

    def command(self, name: str | None = None, **settings: Any) -> Any:
        return super().command(name, **{"cls": _Command, **settings})


class _Command(TyperCommand):
    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            own = "Arguments" if parameter.param_type_name == "argument" else "Options"
            title = getattr(parameter, "rich_help_panel", None) or own
            if (record := parameter.get_help_record(ctx)) is not None:
                name, text = record[0], record[1].replace("\\[", "[")  # old typer escapes for rich
                sections.setdefault(title, []).append((name, with_flags(text)))
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def get_short_help_str(self, limit: int = 0) -> str:
        """The description's first paragraph, whole: the list of commands wraps it."""
        return " ".join((self.help or "").split("\n\n")[0].split())
