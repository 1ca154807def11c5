"""Old names of options, attributes and modules: their use is an error that names the new one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import wraps
from importlib.abc import MetaPathFinder
from inspect import signature
from typing import NoReturn, ParamSpec, TypeVar

from rapid_llm.errors import InvalidParameterError

RENAMED = {
    "attention": "attn_implementation",
    "embed_model": "embedder",
    "min_budget_tokens": "retrieval_tokens",
    "persist_directory": "store",
    "target": "model",
}
"""New name of an option by its old one."""

MOVED = {
    "rapid_llm.evaluation.records": "rapid_llm.evaluation.journal",
    "rapid_llm.evaluation.report": "rapid_llm.evaluation.journal",
}
"""New place of a module's contents by its old name."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


def refuse_old_names(names: Iterable[str], known: Collection[str]) -> None:
    """Raise an error for the old name of a known option.

    Args:
        names: given names.
        known: names of the options.

    Raises:
        InvalidParameterError: an old name; the error has the new one.
    """
    for name in names:
        if RENAMED.get(name) in known:
            raise InvalidParameterError(f"{name!r} is now {RENAMED[name]!r}")


def with_new_names(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """A function whose errors name the new name of an argument that is given by its old one."""
    known = signature(function).parameters

    @wraps(function)
    def checked(*args: _P.args, **options: _P.kwargs) -> _T:
        refuse_old_names(options, known)
        return function(*args, **options)

    return checked


class OldName:
    """Old name of an attribute.

    Args:
        new: new name.
    """

    def __init__(self, new: str) -> None:
        self._new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(f"{owner.__name__}.{self._name} is now {owner.__name__}.{self._new}")


class MovedModules(MetaPathFinder):
    """The last finder of ``sys.meta_path``: asked for modules that no other one has found."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname in MOVED:
            raise ModuleNotFoundError(f"{fullname} is now {MOVED[fullname]}", name=fullname)
