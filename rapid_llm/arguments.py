"""Methods and functions whose arguments are the fields of a dataclass, declared once for all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Concatenate, ParamSpec, TypeVar

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.errors import InvalidParameterError
from rapid_llm.old_names import refuse_old_names
from rapid_llm.options import options_of

_GROUPS = {"sampling": SamplingParams, "speculation": SpeculationConfig}

_P = ParamSpec("_P")
_Self = TypeVar("_Self")
_Made = TypeVar("_Made")
_T = TypeVar("_T")


def arguments_of(
    make: Callable[_P, _Made],
) -> Callable[[Callable[[_Self, _Made], _T]], Callable[Concatenate[_Self, _P], _T]]:
    """Decorator: a method that takes one object is called with that object's fields instead.

    A function with one argument before the object, in the place of ``self``, is called so too.

    Type checkers, editors, ``help`` and ``inspect.signature`` show the fields as its arguments.

    Args:
        make: dataclass of the object.
    """
    fields = signature(make).parameters.values()

    def decorate(
        method: Callable[[_Self, _Made], _T],
    ) -> Callable[Concatenate[_Self, _P], _T]:
        @wraps(method)
        def called(self: _Self, /, *args: _P.args, **named: _P.kwargs) -> _T:
            return method(self, from_arguments(make, *args, **named))

        own = signature(method)
        this, *_ = own.parameters.values()
        called.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[this, *fields]
        )
        return called

    return decorate


def from_arguments(make: Callable[_P, _Made], /, *args: _P.args, **named: _P.kwargs) -> _Made:
    """Make an object of its fields.

    Raises:
        InvalidParameterError: a name is none of its fields'; the error names what to take.
    """
    try:
        return make(*args, **named)
    except TypeError:
        _refuse_unknown(named, signature(make).parameters)
        raise


def _refuse_unknown(names: Iterable[str], known: Collection[str]) -> None:
    """Raise an error for a name that is not known: its new name, the nearest, or where it goes."""
    refuse_old_names(names, known)
    for name in names:
        if name in known:
            continue
        remedy = f"known are {', '.join(known)}"
        if near := get_close_matches(name, known, 1):
            remedy = f"did you mean {near[0]!r}?"
        for argument in _GROUPS.keys() & known:
            group = _GROUPS[argument]
            for option in options_of(group).values():
                if name in (option.name, *option.option.aliases):
                    remedy = f"give it as {argument}={group.__name__}({option.name}=…)"
        raise InvalidParameterError(f"unknown argument {name!r}: {remedy}")
