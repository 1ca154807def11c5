"""The pass of a lean model by PyTorch's operators, over one sequence or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rapid_llm.engine.joined import joined_logits
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.lean import lean_logits
from rapid_llm.engine.parts import Part


class LeanPass:
    """A :class:`rapid_llm.engine.device.JoinedPass` for a lean model on any device."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def serves(self, ids: Tensor, cache: KVCache, keep: int) -> bool:
        return not cache.prefix

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache, keep: int) -> Tensor:
        return lean_logits(self._model, ids, positions, cache, keep)

    def joins(self, parts: Sequence[Part]) -> bool:
        return True

    def joined(self, parts: Sequence[Part]) -> list[Tensor]:
        return joined_logits(self._model, parts)
