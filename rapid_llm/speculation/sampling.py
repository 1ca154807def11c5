"""From a model's logits to the distribution that tokens are drawn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rapid_llm.config import SamplingParams
from rapid_llm.speculation.acceptance import draw


class Sampler:
    """transformers' processors in their own order, and the random numbers of one device.

    Greedy decoding applies the repetition penalty only. Target and drafter see the same
    processors and the same history (the target's prompt and the output), so that p and q differ
    by what the models think, not by what was penalised.

    Args:
        params: what the caller asked for.
        prompt: the target's prompt, which the repetition penalty counts as history.
        device: where logits are and draws are made.
        stream: number of this sampler within one generation; each has its own random stream.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        device: torch.device,
        stream: int = 0,
    ) -> None:
        self.params = params
        self.generator = torch.Generator(device)
        if params.seed is None:
            self.generator.seed()
        else:
            # Streams lie far apart, so that seed + 1 of a user is no stream of ours.
            self.generator.manual_seed((params.seed + stream * 0x9E3779B97F4A7C15) % 2**63)
        self._penalised = params.repetition_penalty not in (None, 1)
        self._history = torch.tensor(prompt, device=device) if self._penalised else None
        self._processors = LogitsProcessorList()
        if self._penalised:
            self._processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        if not params.greedy:
            if params.temperature != 1:
                self._processors.append(TemperatureLogitsWarper(float(params.temperature)))
            if params.top_k:
                self._processors.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1:
                self._processors.append(TopPLogitsWarper(float(params.top_p)))

    def scores(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """Process logits.

        Args:
            logits: float32 ``[n, vocab]``; the last row follows all of ``drafted``, the row
                before it all but one, and so on.
            drafted: int64 ``[at least n - 1]``, tokens after the history.

        Returns:
            float32 ``[n, vocab]``: s for the target; its softmax is p (or q).
        """
        if self._history is None:
            return self._processors(None, logits)
        n, total = logits.shape[0], drafted.shape[0]
        rows = [
            self._processors(
                torch.cat([self._history, drafted[: total - n + 1 + i]])[None], logits[i : i + 1]
            )
            for i in range(n)
        ]
        return torch.cat(rows)

    def draw(self, probabilities: Tensor) -> Tensor:
        """One token from float32 ``[vocab]``: the argmax when greedy, a draw otherwise."""
        if self.params.greedy:
            return probabilities.argmax()
        return draw(probabilities, self.generator)

    def commit(self, tokens: Sequence[int]) -> None:
        """Add tokens of the output to the history."""
        if self._history is not None:
            new = torch.tensor(tokens, device=self._history.device)
            self._history = torch.cat([self._history, new])
