"""Draft loop on the GPU: forward pass, distribution and sampling of a step in one CUDA graph.

The host launches a graph for each step and does not wait for any. With masks it waits for the token
of each step, and copies the mask of the next to the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rapid_llm.engine.cuda.captured import CapturedPasses
from rapid_llm.engine.cuda.graphs import MAX_TOKENS, DrawingGraphs
from rapid_llm.engine.cuda.state import PAST, SLOT
from rapid_llm.engine.device import NextMask, TokenSampler, mask_words
from rapid_llm.engine.kv_cache import KVCache

_PENDING = 2  # maximum tokens read by the first step; two after a fully accepted draft


class DraftLoop:
    """Drafts with one model and one sampler.

    Args:
        passes: captured passes of the model.
        choice: sampler of the draft steps.
    """

    def __init__(self, passes: CapturedPasses, choice: TokenSampler) -> None:
        self._passes = passes
        self._choice = choice
        device = passes.tokens.device
        self._graphs = DrawingGraphs(passes.record, device)
        with torch.inference_mode(False):
            self._drafted = torch.zeros(MAX_TOKENS, dtype=torch.long, device=device)
            self._rows = torch.zeros(MAX_TOKENS, choice.width, device=device)
            words = mask_words(choice.width)
            self._mask = torch.zeros(1, words, dtype=torch.int32, device=device)

    def __call__(
        self,
        pending: Tensor,
        steps: int,
        cache: KVCache,
        generator: torch.Generator,
        masks: NextMask | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Read pending tokens and draft after them.

        Args:
            pending: tokens that are not in the cache yet, int64 ``[n]``, at least one.
            steps: number of tokens to draft, at least 1; at most ``MAX_TOKENS`` are drafted. The
                last one is drawn but not read.
            cache: cache in use with room for n + steps - 1 more tokens.
            generator: random generator, which advances as if it had drawn eagerly.
            masks: function that gives the mask of each drafted token; its first must not be None.

        Returns:
            Drafted tokens, int64 ``[steps]``, or fewer where ``masks`` ended the draft, and the q
            that each was drawn from, float32 ``[…, width]``.
        """
        steps = min(steps, MAX_TOKENS)
        if len(pending) > _PENDING:
            for part in pending[:-1].split(MAX_TOKENS):
                self._passes(part, part, cache, 1)
            pending = pending[-1:]
        self._passes.begin(pending, cache, len(pending) + steps - 1)
        done = 0
        with self._graphs.drawing_from(generator):
            while done < steps:
                if masks is not None:
                    drafted = self._drafted[:done].tolist() if done else []  # the host waits
                    mask = masks(drafted)
                    if mask is None:
                        break
                    self._mask.copy_(mask)
                self._step(len(pending) if done == 0 else 1, masks is not None)
                done += 1
        cache.advance(len(pending) + done - 1)
        return self._drafted[:done].clone(), self._rows[:done].clone()

    def _step(self, n: int, constrained: bool) -> None:
        """Read n tokens, draw one, and write it to the input buffer of the next step."""
        passes = self._passes

        def run() -> Tensor:
            logits = passes.fused(passes.tokens[:n], passes.kv)[-1:]
            mask = self._mask if constrained else None
            q, token = self._choice(logits.float(), self._graphs.generator, mask)
            slot = passes.state[SLOT : SLOT + 1]
            self._rows.index_copy_(0, slot, q[None])
            self._drafted.index_copy_(0, slot, token[None])
            passes.tokens[:1].copy_(token)
            passes.state[PAST].add_(n)
            slot.add_(1)
            return token

        self._graphs((n, constrained), run, [passes.tokens, passes.state])
