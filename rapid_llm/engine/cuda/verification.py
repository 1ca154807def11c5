"""Verification on the GPU: the target's pass over a draft and the verdict in one CUDA graph.

The host launches it, and waits only for the verdict.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rapid_llm.engine.cuda.captured import CapturedPasses
from rapid_llm.engine.cuda.graphs import MAX_TOKENS, DrawingGraphs
from rapid_llm.engine.device import Judge, mask_words
from rapid_llm.engine.kv_cache import KVCache


class Verification:
    """Verifies drafts with one model and one judge.

    Args:
        passes: captured passes of the model.
        judge: function from logits to a verdict.
    """

    def __init__(self, passes: CapturedPasses, judge: Judge) -> None:
        self._passes = passes
        self._judge = judge
        device = passes.tokens.device
        self._graphs = DrawingGraphs(passes.record, device)
        with torch.inference_mode(False):
            self._q = torch.zeros(MAX_TOKENS, judge.width, device=device)
            self._eta = torch.zeros(MAX_TOKENS, 1, device=device)
            words = mask_words(judge.width)
            self._mask = torch.zeros(MAX_TOKENS, words, dtype=torch.int32, device=device)

    def __call__(
        self,
        tokens: Tensor,
        q: Tensor,
        eta: Tensor | None,
        cache: KVCache,
        generator: torch.Generator,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Read a token and the draft after it, and verify the draft.

        Args:
            tokens: the token and the draft, int64 ``[γ+1]``, at most ``MAX_TOKENS``.
            q, eta: see :class:`rapid_llm.engine.device.Judge`; on any device.
            cache: cache in use with room for the tokens.
            generator: random generator, which advances as if it had drawn eagerly.
            mask: mask of allowed tokens, on any device; None without a constraint.

        Returns:
            The judge's verdict.
        """
        passes, n, rows = self._passes, tokens.shape[0], q.shape[0]
        passes.begin(tokens, cache, n)
        self._q[:rows].copy_(q)
        changing, constrained = eta is not None, mask is not None
        if eta is not None:
            self._eta[:rows].copy_(eta)
        if mask is not None:
            self._mask[:n].copy_(mask)

        def run() -> Tensor:
            read = passes.tokens[:n]
            logits = passes.fused(read, passes.kv).float()
            its_eta = self._eta[:rows] if changing else None
            its_mask = self._mask[:n] if constrained else None
            draws = self._graphs.generator
            return self._judge(logits, read[1:], self._q[:rows], its_eta, draws, its_mask)

        with self._graphs.drawing_from(generator):
            verdict = self._graphs((n, rows, changing, constrained), run).clone()
        cache.advance(n)
        return verdict
