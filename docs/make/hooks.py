"""Hooks of mkdocs: tables that are generated from the code when the site is built."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from typing import Any

from rapid_llm.config import EngineConfig, RetrievalConfig, SamplingParams, SpeculationConfig
from rapid_llm.options import Declared, options_of

OPTIONS = "<!-- table of options -->"
COMMANDS = "<!-- commands -->"
FIELDS = re.compile(r"<!-- fields of ([\w.]+)\.(\w+) -->")
_SHORT = re.compile(r"<code>(?=[^<\s]{1,32}</code>)")
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?\.?([^<]*)</code>")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the tables where a page has their comments."""
    if OPTIONS in markdown:
        markdown = markdown.replace(OPTIONS, options_table())
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands())
    return FIELDS.sub(lambda found: fields_table(*found.groups()), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Shows Sphinx's roles in docstrings as code, and keeps short words of code in one line."""
    return _SHORT.sub('<code class="whole">', _ROLE.sub(r"<code>\1</code>", html))


def groups() -> tuple[type, ...]:
    """All dataclasses that declare options."""
    found = (SamplingParams, SpeculationConfig, EngineConfig, RetrievalConfig)
    if importlib.util.find_spec("rapid_llm.server") is None:
        return found
    from rapid_llm.server.settings import ServerConfig

    return (*found, ServerConfig)


def options_table() -> str:
    """Every option in one Markdown table."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "| option | meaning | values | default | in a call |"
    yield "|---|---|---|---|---|"
    for group in groups():
        yield f"| **{group.title}** (`{group.__name__}`) | | | | |"  # type: ignore[attr-defined]
        for declared in options_of(group).values():
            yield _row(declared)


def _row(declared: Declared) -> str:
    option = declared.option
    names = ", ".join(f"`{name}`" for name in (declared.name, *option.aliases))
    default = declared.default
    shown = "" if default in ({}, ()) else f"`{default!r}`"
    cells = names, option.help, declared.limit, shown, "yes" if option.per_call else "no"
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def shared_names() -> Iterator[str]:
    """Names of the options that both wheels take as they are, and their aliases."""
    for name, declared in options_of(SamplingParams, SpeculationConfig, EngineConfig).items():
        yield from (name, *declared.option.aliases)


def fields_table(module: str, name: str) -> str:
    """The fields of a wheel's class, without its framework's and those of :func:`shared_names`."""
    made = getattr(importlib.import_module(module), name)
    left_out = set(shared_names())
    for base in made.__mro__:
        if "rapid" not in base.__module__:
            left_out.update(getattr(base, "model_fields", ()))
    lines = ["| field | meaning | default |", "|---|---|---|"]
    for each, field in made.model_fields.items():
        if each not in left_out:
            text = " ".join(field.description.split()).replace("``", "`").replace("|", "\\|")
            lines.append(f"| `{each}` | {text} | `{field.default!r}` |")
    return "\n".join(lines)


def commands() -> str:
    """The help of every command, as it is printed in 100 columns."""
    import typer

    from rapid_llm.cli import app

    command = typer.main.get_command(app)
    return "\n\n".join(
        f"## rapid-llm {name} {{#{name}}}\n\n{each.help}\n\n{_parameters(each)}"
        for name, each in command.commands.items()  # type: ignore[attr-defined]
    )


def _parameters(command: Any) -> str:
    """A command's own parameters; those of the table of options are named only."""
    known = options_of(*groups())
    lines, shared = ["| parameter | meaning |", "|---|---|"], []
    for each in command.params:
        option = each.param_type_name == "option" and known.get(each.name)
        if option and (each.help or "").lower().startswith(option.option.help.lower()):
            shared.append(f"`{each.opts[0]}`")
        elif not getattr(each, "hidden", False):
            names = ", ".join(f"`{name}`" for name in each.opts)
            if each.param_type_name == "argument":
                names = f"`{each.metavar}`"
            text = (getattr(each, "help", None) or "").replace("|", "\\|")
            lines.append(f"| {names} | {text} |")
    table = "\n".join(lines) if len(lines) > 2 else ""
    options = f"Options of [the table](options.md): {', '.join(shared)}." if shared else ""
    return "\n\n".join(part for part in (table, options) if part)
