"""Extension of griffe: a method with ``arguments_of`` is shown with the dataclass's fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import griffe


class ArgumentsOf(griffe.Extension):
    """Gives methods that ``rapid_llm.arguments.arguments_of`` decorates their arguments."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called for each package that was read."""
        for method in _functions(pkg):
            for decorator in method.decorators:
                call = decorator.value
                if isinstance(call, griffe.ExprCall) and call.canonical_path.endswith(
                    "arguments.arguments_of"
                ):
                    made = pkg[str(call.arguments[0].canonical_path).removeprefix(f"{pkg.path}.")]  # type: ignore[union-attr]
                    method.parameters = griffe.Parameters(method.parameters[0], *_parameters(made))


def _functions(found: Any) -> Iterator[griffe.Function]:
    for member in found.members.values():
        if member.is_alias:
            continue
        if member.is_function:
            yield member
        elif member.is_module or member.is_class:
            yield from _functions(member)


def _parameters(made: Any) -> Iterator[griffe.Parameter]:
    kind = griffe.ParameterKind.positional_or_keyword
    for name, field in made.attributes.items():
        if name == "_":
            kind = griffe.ParameterKind.keyword_only
        else:
            yield griffe.Parameter(
                name, annotation=field.annotation, kind=kind, default=field.value
            )
