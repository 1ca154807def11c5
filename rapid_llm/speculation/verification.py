"""The target's side of a round: from its logits to what the host must know.

All on the device: processors, acceptance, the token after the accepted ones, and whether a model
has produced NaN. One small tensor goes to the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from rapid_llm.config import SpeculationConfig
from rapid_llm.speculation.acceptance import verify_greedy, verify_sampled
from rapid_llm.speculation.sampling import Sampler


class Verdict(NamedTuple):
    """What the host must know of a round.

    Attributes:
        accepted: how many of the drafted tokens are kept.
        token: the one after them.
        target_nan, drafter_nan: whether logits, or q, hold NaN.
        drafted: all tokens of the draft.
    """

    accepted: int
    token: int
    target_nan: bool
    drafter_nan: bool
    drafted: list[int]

    @classmethod
    def read(cls, verdict: Tensor) -> Verdict:
        """What :func:`verify` has written; the host waits for it."""
        accepted, token, target_nan, drafter_nan, *drafted = verdict.tolist()
        return cls(accepted, token, bool(target_nan), bool(drafter_nan), drafted)


def verify(
    logits: Tensor,
    s: Tensor,
    draft: Tensor,
    q: Tensor,
    eta: Tensor | None,
    config: SpeculationConfig,
    generator: torch.Generator | None,
) -> Tensor:
    """Judge a draft; no host synchronisation.

    Args:
        logits: float32 ``[γ+1, vocab]``, the target's.
        s: the same, processed.
        draft, q, eta, config: as for :func:`.acceptance.verify_sampled`.
        generator: draws; None is greedy.

    Returns:
        int64 ``[γ+4]``, see :class:`Verdict`.
    """
    if generator is None:
        accepted, token = verify_greedy(s, q, draft, config, eta)
    else:
        accepted, token = verify_sampled(s, q, draft, config, generator, eta)
    broken = torch.stack([logits.sum().isnan(), q.sum().isnan()]).long()
    return torch.cat([accepted[None], token[None], broken, draft])


@dataclass(frozen=True)
class Judge:
    """Processors without a history and :func:`verify`, for rounds that run without the host.

    Attributes:
        key: equal where drafts are judged alike.
        width: tokens that logits and q are over.
    """

    key: tuple[Any, ...]
    width: int
    _processors: LogitsProcessorList = field(compare=False)
    _config: SpeculationConfig = field(compare=False)
    _greedy: bool = field(compare=False)

    @classmethod
    def of(cls, sampler: Sampler, config: SpeculationConfig, width: int) -> Judge | None:
        """None where more counts than the logits: what was said before."""
        settings = sampler.settings
        if settings is None:
            return None
        key = settings, config.applied_mode, config.transfer_strength, config.alpha
        return cls(key, width, sampler.processors, config, sampler.params.greedy)

    def __call__(
        self,
        logits: Tensor,
        draft: Tensor,
        q: Tensor,
        eta: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """See :class:`rapid_llm.engine.device.Judge`, and :func:`verify` for what it returns."""
        s = self._processors(None, logits)
        draws = None if self._greedy else generator
        return verify(logits, s, draft, q, eta, self._config, draws)
