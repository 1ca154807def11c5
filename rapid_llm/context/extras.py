"""Import optional packages, with an error that names the extra to install."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from rapid_llm.errors import MissingDependencyError


def import_extra(package: str, extra: str, needed_for: str) -> ModuleType:
    """Import a package of one of rapid-llm's extras.

    Args:
        package: import name of the package.
        extra: extra of rapid-llm that installs it.
        needed_for: purpose of the package, with which the error begins.

    Raises:
        MissingDependencyError: the package is not installed, or cannot be imported.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"{needed_for} needs the package {package}, which cannot be imported "
            f'({first_line(error)}): run pip install "rapid-llm[{extra}]"'
        ) from error


def first_line(error: BaseException) -> str:
    """First line of an error's message; its type if the message is empty."""
    return str(error).strip().split("\n")[0] or type(error).__name__
