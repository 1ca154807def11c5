"""Callbacks for the progress of long work, each called with what is done and the total."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the number of done parts, such as tokens or chunks, and their total number."""

PromptProgress: TypeAlias = Callable[[Literal["draft", "target"], int, int], None]
"""Called with whose prompt is read, its tokens that were read, and its number of tokens."""

Stage: TypeAlias = Literal["embed", "draft", "target"]

StageProgress: TypeAlias = Callable[[Stage, int, int], None]
"""Called with the stage of an answer, and its done and total chunks or tokens."""
