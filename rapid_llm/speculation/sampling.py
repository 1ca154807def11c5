"""From a model's logits to the distribution that tokens are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
        self._penalised = params.repetition_penalty != 1
        self._history = torch.tensor(prompt, device=device) if self._penalised else None
        self._processors = LogitsProcessorList()
        if self._penalised:
            self._processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        self._processors.extend(_warpers(params))

    def choice(self, width: int) -> Choice | None:
        """How to draw where no history counts; None where it does, with a repetition penalty."""
        return None if self._penalised else Choice.of(self.params, width)

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


@dataclass(frozen=True)
class Choice:
    """A sampler without a history, for steps that run without the host.

    Attributes:
        temperature, top_k, top_p: as in SamplingParams.
        width: tokens that q is over; logits of another width are padded with -inf.
    """

    temperature: float
    top_k: int
    top_p: float
    width: int

    @classmethod
    def of(cls, params: SamplingParams, width: int) -> Choice:
        return cls(params.temperature, params.top_k, params.top_p, width)

    def __call__(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Float32 ``[1, vocab]`` to q, ``[width]``, and a token drawn from it, an int64 scalar."""
        params = SamplingParams(self.temperature, self.top_p, self.top_k)
        q = _warpers(params)(None, padded(logits, self.width)).softmax(dim=-1)[0]
        return q, q.argmax() if params.greedy else draw(q, generator)


def padded(logits: Tensor, width: int) -> Tensor:
    """``[n, vocab]`` as ``[n, width]``; tokens that the vocabulary lacks get no probability."""
    surplus = width - logits.shape[-1]
    return F.pad(logits, (0, surplus), value=float("-inf")) if surplus else logits


def _warpers(params: SamplingParams) -> LogitsProcessorList:
    """Everything but the penalty, in transformers' order; nothing when greedy."""
    warpers = LogitsProcessorList()
    if not params.greedy:
        if params.temperature != 1:
            warpers.append(TemperatureLogitsWarper(float(params.temperature)))
        if params.top_k:
            warpers.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            warpers.append(TopPLogitsWarper(float(params.top_p)))
    return warpers
