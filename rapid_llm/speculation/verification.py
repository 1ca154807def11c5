"""Verify a draft on the device: from the target's logits to a verdict for the host.

Processors, acceptance, the token after the accepted ones and the check for NaN all run on the
device; one small tensor goes to the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from rapid_llm.config import SpeculationConfig
from rapid_llm.speculation.acceptance import verify_greedy, verify_sampled
from rapid_llm.speculation.constraints import masked
from rapid_llm.speculation.sampling import Sampler


class Verdict(NamedTuple):
    """Outcome of a round, on the host.

    Attributes:
        accepted: number of accepted tokens.
        token: token after them.
        target_nan, drafter_nan: whether the target's logits, or q, contain NaN.
        drafted: all tokens of the draft.
    """

    accepted: int
    token: int
    target_nan: bool
    drafter_nan: bool
    drafted: list[int]

    @classmethod
    def read(cls, verdict: Tensor) -> Verdict:
        """Copy the result of :func:`verify` to the host, which waits for it."""
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
    """Verify a draft without host synchronisation.

    Args:
        logits: the target's logits, float32 ``[γ+1, vocab]``.
        s: processed logits, float32 ``[γ+1, vocab]``.
        draft, q, eta, config: see :func:`.acceptance.verify_sampled`.
        generator: random generator; None for greedy decoding.

    Returns:
        int64 ``[γ+4]``, to be read by :meth:`Verdict.read`.
    """
    if generator is None:
        accepted, token = verify_greedy(s, q, draft, config, eta)
    else:
        accepted, token = verify_sampled(s, q, draft, config, generator, eta)
    broken = torch.stack([logits.sum().isnan(), q.sum().isnan()]).long()
    return torch.cat([accepted[None], token[None], broken, draft])


@dataclass(frozen=True)
class Judge:
    """Processors without history followed by :func:`verify`, for rounds that run without the host.

    Attributes:
        key: key of the verification, equal for judges that verify the same way.
        width: vocabulary size of logits and q.
    """

    key: tuple[Any, ...]
    width: int
    _processors: LogitsProcessorList = field(compare=False)
    _config: SpeculationConfig = field(compare=False)
    _greedy: bool = field(compare=False)

    @classmethod
    def of(cls, sampler: Sampler, config: SpeculationConfig, width: int) -> Judge | None:
        """The judge for a sampler; None where its processors depend on the history.

        Args:
            sampler: the target's sampler.
            config: speculation options.
            width: vocabulary size of the target.
        """
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
        mask: Tensor | None = None,
    ) -> Tensor:
        """Verify a draft; see :class:`rapid_llm.engine.device.Judge`, and :func:`verify`."""
        s = self._processors(None, logits if mask is None else masked(logits, mask))
        draws = None if self._greedy else generator
        return verify(logits, s, draft, q, eta, self._config, draws)
