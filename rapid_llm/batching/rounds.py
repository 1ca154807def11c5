"""Rounds of speculation over all running sequences: joint drafts, one pass that verifies them.

Between two rounds one pass is for prompts, the earliest sequence's first, so that a long document
does not stop the answers that have begun.
"""

from __future__ import annotations

from collections.abc import Iterable

from rapid_llm.batching.sequence import Sequence
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.session import Extend, Purpose, extend_all

MOST_READ = 512
"""Maximum number of tokens of a joined pass over prompts, which bounds its activations' memory."""

MOST_DECODED = 128
"""The same for drafts and verifications: for more, devices have no passes for few tokens."""


def run_round(sequences: list[Sequence]) -> None:
    """Run one round of all sequences that decode, and one pass over prompts.

    Args:
        sequences: sequences under way, the earliest first. Each waits for a pass; some have ended
            afterwards.
    """
    decoding = [each for each in sequences if not each.reading]
    for each in sequences:
        each.expect(max(1, len(decoding)))
        each.by_itself = len(sequences) == 1
    while drafting := _waiting(decoding, "draft"):
        _run(drafting)
    _run(_waiting(decoding, "verify"))
    _run(_next_to_read(_waiting(sequences, "read")))


def _waiting(sequences: Iterable[Sequence], purpose: Purpose) -> list[Sequence]:
    return [
        each
        for each in sequences
        if not each.ticket.cancelled and each.wanted is not None and each.wanted.purpose == purpose
    ]


def _next_to_read(reading: list[Sequence]) -> list[Sequence]:
    """The sequences whose prompts are read next: the first, or several short rests of prompts.

    KV that is kept is computed by the passes of a prefill alone, so that an answer with it equals
    one without, bit for bit; what follows a borrowed document is not kept.
    """
    rests = [each for each in reading if _wanted(each).session.cache.prefix]
    return rests if reading and reading[0] in rests else reading[:1]


def _wanted(sequence: Sequence) -> Extend:
    assert sequence.wanted is not None
    return sequence.wanted


def _run(sequences: list[Sequence]) -> None:
    """Run a pass of each sequence, joined with those of the same model."""
    by_runner: dict[ModelRunner, list[Sequence]] = {}
    for each in sequences:
        by_runner.setdefault(_wanted(each).session.runner, []).append(each)
    for runner, group in by_runner.items():
        parts = _parts(group) if runner.joins else [[each] for each in group]
        if any(each.reading for each in group):
            _run_joined(parts[0])
            return  # one pass over prompts
        for part in parts:
            _run_joined(part)


def _parts(group: list[Sequence]) -> list[list[Sequence]]:
    """The group in parts of as many tokens as a pass may have."""
    most = MOST_READ if any(each.reading for each in group) else MOST_DECODED
    parts: list[list[Sequence]] = []
    tokens = 0
    for each in group:
        new = len(_wanted(each).tokens)
        if not parts or tokens + new > most:
            parts.append([])
            tokens = 0
        parts[-1].append(each)
        tokens += new
    return parts


def _run_joined(sequences: list[Sequence]) -> None:
    """Run the passes as one; where that fails, one by one, so that each gets its own error."""
    if len(sequences) > 1:
        try:
            results = extend_all([_wanted(each) for each in sequences])
        except Exception:
            results = None
        if results is not None:
            for each, logits in zip(sequences, results, strict=True):
                each.send(logits)
            return
    for each in sequences:
        each.run()
