"""Texts in the words of the command line: ``--top-p 2`` in the place of ``top_p=2``."""

from __future__ import annotations

import re
from functools import cache

import typer

_BEFORE = r"""(?<![\w/.'"-])(?<!\w\()"""
_PLAIN = r"""[^\s,;:()'"`\[{]"""
_VALUE = rf"""(?P<value>'[^']*'|"[^"]*"|{_PLAIN}*(?![.]){_PLAIN}|(?=[\s,;.]|$))"""


def with_flags(text: str) -> str:
    """A text with flags in the place of options' Python names.

    A name is an option's where a value follows, where it has an underscore, and where its limit is
    told (``: eta must be …``); but not in quotes, paths and calls.
    """
    return _names().sub(_flag, text)


@cache
def _names() -> re.Pattern[str]:
    every = "|".join(_flags())
    long = "|".join(name for name in _flags() if "_" in name)
    return re.compile(
        rf"""{_BEFORE}(?:(?P<given>{every})={_VALUE}|(?P<bare>{long})(?!\.?[\w/'"=-])"""
        rf"|(?<=: )(?P<limited>{every})(?= must be))"
    )


applications: list[typer.Typer] = []
"""The applications whose options have flags."""


@cache
def _flags() -> dict[str, str]:
    """Flag of every command's options, by Python name."""
    return {
        parameter.name: next(flag for flag in parameter.opts if flag.startswith("--"))
        for application in map(typer.main.get_command, applications)
        for command in application.commands.values()  # type: ignore[attr-defined]
        for parameter in command.params
        if parameter.param_type_name == "option"
    }


def _flag(found: re.Match[str]) -> str:
    name, value = found["given"] or found["bare"] or found["limited"], found["value"]
    flag = _flags()[name]
    if not value or value == "True":
        return flag
    plain = re.fullmatch(r"""(['"])([\w./-]+)\1""", value)
    return f"{flag} {plain[2] if plain else value}"
