"""Cache folders of this library, for measured costs and converted models."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``RAPID_LLM_CACHE``, or ``rapid-llm`` in the user's cache folder."""
    if given := os.environ.get("RAPID_LLM_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "rapid-llm")
