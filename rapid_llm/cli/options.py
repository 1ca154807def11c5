"""Options of the command line, derived from those that :mod:`rapid_llm.config` declares."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Annotated, Any, Literal, get_origin

import typer

from rapid_llm.options import Declared, json_or_text, options_of, sorted_into

_NONE = "none"
"""Word for None in options whose default is another value."""


def with_options(
    *groups: type, leave_out: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a command the options of dataclasses.

    The command receives an instance of each dataclass, in this order, as its first arguments.

    Args:
        groups: dataclasses whose fields declare options.
        leave_out: names of options that the command does not offer.
        defaults: defaults that differ from the declared ones, by option name.
    """
    own = defaults or {}

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        declared = {n: each for n, each in options_of(*groups).items() if n not in leave_out}
        signature = inspect.signature(command)
        kept = list(signature.parameters.values())[len(groups) :]

        @wraps(command)
        def run(**arguments: Any) -> Any:
            given = {name: arguments.pop(name) for name in declared}
            values = {name: _value(declared[name], value) for name, value in given.items()}
            return command(*sorted_into(values, *groups), **arguments)

        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_default(each, own.get(name, each.default)),
                annotation=_annotation(each),
            )
            for name, each in declared.items()
        ]
        hints = inspect.get_annotations(command, eval_str=True)
        kept = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY)
                for p in kept]  # fmt: skip
        run.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*kept, *added)}
        return run

    return decorate


def _annotation(declared: Declared) -> Any:
    option, kinds = declared.option, declared.kinds
    settings: dict[str, Any] = {
        "help": option.help.replace("None", _NONE) if _NONE in _words(declared) else option.help,
        "metavar": option.metavar,
        "rich_help_panel": declared.group.title,
    }
    origin = _container(declared)
    kind: Any
    if kinds == (int,) and (words := _words(declared)):  # a number or a word
        kind, settings["parser"] = Any, number_or_word(words)
        settings["metavar"] = "|".join(["N", *words])
    elif declared.choices:
        words = _words(declared)
        kind = Literal[words]
    elif origin is not None:  # a list or mapping, given one element at a time
        kind = list[str] | None
        if issubclass(origin, Mapping):
            settings["metavar"] = "NAME=VALUE"
        settings["help"] += " May be repeated."
        settings["show_default"] = False
    else:
        kind = kinds[0]
    if declared.optional and declared.default is None and origin is None:
        kind = kind | None
    if kind is bool or kind == bool | None:
        return Annotated[kind, typer.Option(**settings)]
    aliases = ["--" + alias.replace("_", "-") for alias in option.aliases]
    return Annotated[kind, typer.Option(_flag(declared), *aliases, **settings)]


def _container(declared: Declared) -> Any:
    """``Sequence`` or ``Mapping`` for an option of several values; None for a single value."""
    return get_origin(declared.kinds[0]) if declared.kinds else None


def _origins(declared: Declared) -> list[Any]:
    """Unparametrized types that the option takes."""
    return [get_origin(kind) for kind in declared.kinds]


def _json(declared: Declared, given: str) -> Any:
    try:
        return json.loads(given)
    except ValueError as error:
        raise typer.BadParameter(
            f"{given!r} is not JSON ({error})", param_hint=_flag(declared)
        ) from None


def _words(declared: Declared) -> tuple[str, ...]:
    """Words that the option takes, including one for None if its default is another value."""
    none = declared.optional and declared.default is not None
    return (*declared.choices, _NONE) if none else declared.choices


def _flag(declared: Declared) -> str:
    """Flag of the option, in the singular where elements are given one at a time."""
    name = declared.name
    if _container(declared) is not None:
        name = name.removesuffix("s")
    return "--" + name.replace("_", "-")


def _default(declared: Declared, default: Any) -> Any:
    return default if _container(declared) is None else None


def _value(declared: Declared, given: Any) -> Any:
    """Convert a value of the command line to a value of the option."""
    origin = _container(declared)
    if origin is not None and given is None:
        return declared.default
    if origin is not None and issubclass(origin, Mapping):
        return _pairs(declared, given)
    if given == _NONE and _NONE in _words(declared):
        return None
    if isinstance(given, str) and given.startswith("{") and Mapping in _origins(declared):
        return _json(declared, given)
    return given


def _pairs(declared: Declared, given: Sequence[str]) -> dict[str, Any]:
    """Parse ``name=value`` pairs; a value that is not JSON is text."""
    pairs = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not name or not equals:
            shown = "the value" if declared.option.private else repr(each)
            raise typer.BadParameter(
                f"{shown} is not allowed: give a name and a value, as in name=value",
                param_hint=_flag(declared),
            )
        pairs[name] = json_or_text(value)
    return pairs


def number_or_word(words: Sequence[str]) -> Callable[[str], Any]:
    """A parser for options whose values are a whole number or one of some words."""

    def parse(value: Any) -> Any:
        if value in words or not isinstance(value, str):
            return value
        try:
            return int(value)
        except ValueError:
            either = " or ".join(map(repr, words))
            raise typer.BadParameter(f"{value!r} is neither {either} nor a whole number") from None

    return parse
