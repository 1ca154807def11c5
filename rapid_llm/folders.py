"""Folders of this library: its packaged data, and its cache of costs and converted models."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path


def cache_folder() -> Path:
    """``RAPID_LLM_CACHE``, or ``rapid-llm`` in the user's cache folder."""
    if given := os.environ.get("RAPID_LLM_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "rapid-llm")


def packaged_text(name: str) -> str:
    """Text of a file in the package's folder ``data``."""
    return (resources.files("rapid_llm") / "data" / name).read_text("utf-8")
