"""Folders: this library's packaged data and its cache, and those that options name."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from rapid_llm.errors import InvalidParameterError


def cache_folder() -> Path:
    """``RAPID_LLM_CACHE``, or ``rapid-llm`` in the user's cache folder."""
    if given := os.environ.get("RAPID_LLM_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "rapid-llm")


def require_folder(option: str, path: str | Path) -> Path:
    """Refuse a folder of which no file could be read or written; it is not made yet.

    Args:
        option: name of the option that names it.
        path: the folder, which may be read-only; ``~`` is the user's home.

    Raises:
        InvalidParameterError: it, or one that it is to be made in, is a file; it is not there and
            cannot be made; or its files cannot be read.
    """
    folder = Path(path).expanduser()
    there = next(part for part in (folder, *folder.absolute().parents) if os.path.lexists(part))
    reason = None
    if not there.is_dir():
        reason = f"{there} is no folder"
    elif not is_read_only(folder) and not os.access(there, os.W_OK | os.X_OK):
        reason = f"{there} is not writable"
    if reason is not None:
        raise InvalidParameterError(
            f"{option}='{path}' cannot be used, because {reason}: give a folder that this process "
            f"may write to, or leave {option} out"
        )
    return folder


def is_read_only(folder: Path) -> bool:
    """Whether a folder's files can be read, and none can be written."""
    if not folder.is_dir() or os.access(folder, os.W_OK):
        return False
    return os.access(folder, os.R_OK | os.X_OK)


def packaged_text(name: str) -> str:
    """Text of a file in the package's folder ``data``."""
    return (resources.files("rapid_llm") / "data" / name).read_text("utf-8")
