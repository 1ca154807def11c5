"""Draft steps that feed one another: pass, distribution and draw in one graph.

The host launches a graph for each step and waits for none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rapid_llm.engine.cuda.captured import CapturedPasses
from rapid_llm.engine.cuda.graphs import MAX_TOKENS, DrawingGraphs
from rapid_llm.engine.cuda.state import PAST, SLOT
from rapid_llm.engine.device import TokenSampler
from rapid_llm.engine.kv_cache import KVCache

_PENDING = 2  # tokens that the first step may read: after a draft that was kept whole there are two


class DraftLoop:
    """Drafts with one model, by one way of sampling.

    Args:
        passes: of the model.
        choice: what becomes of the logits.
    """

    def __init__(self, passes: CapturedPasses, choice: TokenSampler) -> None:
        self._passes = passes
        self._choice = choice
        device = passes.tokens.device
        self._graphs = DrawingGraphs(passes.record, device)
        with torch.inference_mode(False):
            self._drafted = torch.zeros(MAX_TOKENS, dtype=torch.long, device=device)
            self._rows = torch.zeros(MAX_TOKENS, choice.width, device=device)

    def __call__(
        self, pending: Tensor, steps: int, cache: KVCache, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Read the pending tokens, and draft ``steps`` tokens after them, ``MAX_TOKENS`` at most.

        Args:
            pending: int64 ``[n]``, at least one.
            steps: at least 1. The last token is drawn, but not read.
            cache: is in use and has room for n + steps - 1 more tokens.
            generator: draws, and is left as if it had drawn eagerly.

        Returns:
            The tokens, int64 ``[steps]``, and the q that each was drawn from, float32
            ``[steps, width]``.
        """
        steps = min(steps, MAX_TOKENS)
        if len(pending) > _PENDING:
            for part in pending[:-1].split(MAX_TOKENS):
                self._passes(part, part, cache, 1)
            pending = pending[-1:]
        self._passes.begin(pending, cache, len(pending) + steps - 1)
        with self._graphs.drawing_from(generator):
            for step in range(steps):
                self._step(len(pending) if step == 0 else 1)
        cache.advance(len(pending) + steps - 1)
        return self._drafted[:steps].clone(), self._rows[:steps].clone()

    def _step(self, n: int) -> None:
        """Read n tokens, draw one, and make it the token that the next step reads."""
        passes = self._passes

        def run() -> Tensor:
            logits = passes.fused(passes.tokens[:n], passes.state)[-1:]
            q, token = self._choice(logits.float(), self._graphs.generator)
            slot = passes.state[SLOT : SLOT + 1]
            self._rows.index_copy_(0, slot, q[None])
            self._drafted.index_copy_(0, slot, token[None])
            passes.tokens[:1].copy_(token)
            passes.state[PAST].add_(n)
            slot.add_(1)
            return token

        self._graphs(n, run, [passes.tokens, passes.state])
