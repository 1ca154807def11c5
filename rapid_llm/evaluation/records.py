"""What an evaluation writes: one JSON line an answer, and the settings of the run beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RESULTS = "results.jsonl"
SETTINGS = "run.json"


@dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        task: name of the task.
        item: id of the item.
        method: name of the method with its options, such as ``rapid η=10`` or
            ``rapid η=10, irrelevant``.
        base: the method without options: ``lc``, ``rag``, ``sd``, ``rapid``, ``streaming``,
            ``triforce``, ``rest``, ``speculative-rag``.
        options: what distinguishes it: ``eta``, ``gamma``, ``mode``, ``context_tokens``,
            ``chunk_tokens``, ``retriever``, ``irrelevant``, ``dynamic_eta``, ….
        answer: the text that was scored.
        scores: by metric.
        groups: the item's.
        stats: of the generation (``Stats.as_dict()``).
        accepted_at: for each position of a draft, 1st, 2nd, …: (times judged, times accepted).
        retrieved: whether a reference stood in what the drafter read; None if nothing was.
    """

    task: str
    item: str
    method: str
    base: str
    options: Mapping[str, Any]
    answer: str
    scores: Mapping[str, float]
    groups: Mapping[str, str] = field(default_factory=dict)
    stats: Mapping[str, Any] = field(default_factory=dict)
    accepted_at: tuple[tuple[int, int], ...] = ()
    retrieved: bool | None = None
