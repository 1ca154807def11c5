"""Packages that only some of the library needs: imported where they are used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from rapid_llm.errors import MissingDependencyError


def import_extra(package: str, extra: str, needed_for: str) -> ModuleType:
    """A package of one of rapid-llm's extras.

    Args:
        package: the name by which it is imported.
        extra: what installs it.
        needed_for: begins the error: what cannot be done without it.

    Raises:
        MissingDependencyError: it is not installed, or what is installed cannot be imported.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"{needed_for} needs the package {package}, which cannot be imported "
            f'({first_line(error)}): run pip install "rapid-llm[{extra}]"'
        ) from error


def first_line(error: BaseException) -> str:
    """What an error says, on one line; its type if it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__
