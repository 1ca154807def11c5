"""The RAG drafter: a language model that reads only what was retrieved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid_llm.engine.session import PrefillProgress, Session
from rapid_llm.speculation.drafters.base import Draft
from rapid_llm.speculation.sampling import Sampler


class RagDrafter:
    """Drafts with a model over the retrieval context.

    Args:
        session: the drafting model with room for ``prompt`` and the output.
        prompt: the retrieval context and the question, at least one token.
        sampler: on the session's device.
        vocab_size: width of the target's logits. A drafter of the same tokenizer may pad its
            own to another width; tokens beyond the target's get no probability.
    """

    def __init__(
        self, session: Session, prompt: Sequence[int], sampler: Sampler, vocab_size: int
    ) -> None:
        self._session = session
        self._prompt = list(prompt)
        self._sampler = sampler
        self._vocab_size = vocab_size

    @property
    def prompt_tokens(self) -> int:
        return len(self._prompt)

    def prefill(self, progress: PrefillProgress | None) -> None:
        # All but the last token, which the first draft feeds: its logits are needed only then.
        self._session.prefill(self._prompt[:-1], progress)

    def draft(self, output: Sequence[int], gamma: int, *, look_ahead: bool) -> Draft:
        """See :class:`Drafter`; γ (or γ+1) forward passes, no host synchronisation."""
        sequence = [*self._prompt, *output]
        # What was drafted and not kept is forgotten; the last kept token is yet to be read.
        self._session.rollback(len(sequence) - 1)
        pending = torch.tensor(sequence[self._session.length :])
        tokens = torch.empty(0, dtype=torch.long, device=self._session.forward.device)
        rows: list[Tensor] = []
        for _ in range(gamma + look_ahead):
            logits = self._fit(self._session.extend(pending)[-1:])
            q = self._sampler.scores(logits, tokens).softmax(dim=-1)[0]
            rows.append(q)
            pending = self._sampler.draw(q)[None]
            tokens = torch.cat([tokens, pending])
        return Draft(tokens[:gamma], torch.stack(rows))

    def _fit(self, logits: Tensor) -> Tensor:
        surplus = self._vocab_size - logits.shape[-1]
        return F.pad(logits, (0, surplus), value=float("-inf")) if surplus else logits
