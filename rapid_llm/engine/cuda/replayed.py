"""All CUDA graphs of a model: captured passes, draft loops and verification."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

from rapid_llm.engine.cuda.captured import CapturedPasses
from rapid_llm.engine.cuda.draft_loop import DraftLoop
from rapid_llm.engine.cuda.verification import Verification
from rapid_llm.engine.device import Judge, TokenSampler

_KEPT = 4  # maximum number of draft loops (one per sampler), and of verifications (one per judge)

_Key = TypeVar("_Key")
_Kept = TypeVar("_Kept")


class ReplayedPasses(CapturedPasses):
    """Captured passes with draft loops and verification.

    See :class:`rapid_llm.engine.device.ReplayedPass`.
    """

    def __init__(self, model: Any, insist: bool) -> None:
        super().__init__(model, insist)
        self._loops: OrderedDict[TokenSampler, DraftLoop] = OrderedDict()
        self._verifications: OrderedDict[Judge, Verification] = OrderedDict()

    def loop(self, choice: TokenSampler) -> DraftLoop:
        """The draft loop for a sampler."""
        return _latest(self._loops, choice, lambda: DraftLoop(self, choice))

    def verification(self, judge: Judge) -> Verification:
        """The verification for a judge."""
        return _latest(self._verifications, judge, lambda: Verification(self, judge))


def _latest(kept: OrderedDict[_Key, _Kept], key: _Key, make: Callable[[], _Kept]) -> _Kept:
    """Value of a key in an LRU cache, made at the first use."""
    value = kept.pop(key) if key in kept else make()
    kept[key] = value
    if len(kept) > _KEPT:
        kept.popitem(last=False)
    return value
