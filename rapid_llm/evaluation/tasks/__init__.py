"""The tasks of the evaluation, by name."""

from __future__ import annotations

from dataclasses import replace

from rapid_llm.errors import InvalidParameterError
from rapid_llm.evaluation.tasks import infinitebench, joined, longbench, needle
from rapid_llm.evaluation.tasks.base import Source, Task

MADE_TO_LENGTH = {
    "needle": (needle.load, 6000),
    "squad": (joined.squad, 1700),
    "nq": (joined.nq, 6500),
    "mtbench101": (joined.mtbench101, 6000),
}
"""Loaders of tasks whose contexts are made to a length, and the default length in tokens."""

TASKS = (
    *(f"infinitebench-{part}" for part in infinitebench.PARTS),
    *("longbench-v2", "longbench-v2-cot", *MADE_TO_LENGTH),
)


def load_task(name: str, source: Source) -> Task:
    """Load one of :data:`TASKS`; its first items do not depend on ``limit``.

    Raises:
        InvalidParameterError: the task is unknown, or a number is outside its range.
        DataError: the data is missing, lacks a field, or is too short for the context.
        DocumentError: the text for ``needle`` cannot be read.
    """
    if name not in TASKS:
        raise InvalidParameterError(f"task={name!r} is unknown; choose one of {', '.join(TASKS)}")
    for parameter, value in (("context_tokens", source.context_tokens), ("limit", source.limit)):
        if value is not None and value < 1:
            raise InvalidParameterError(
                f"{parameter}={value} is not allowed: {parameter} must be at least 1"
            )
    if name in MADE_TO_LENGTH:
        make, length = MADE_TO_LENGTH[name]
        return make(replace(source, context_tokens=source.context_tokens or length))
    return (longbench if name.startswith("longbench") else infinitebench).load(name, source)
