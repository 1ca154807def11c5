"""Drafting with the target itself over a small part of its own KV cache.

*streaming* keeps the first tokens and the latest ones (StreamingLLM, arXiv 2309.17453; as a
drafter in MagicDec, arXiv 2408.11049). *triforce* keeps the chunks that the end of the prompt
attends to most, chosen by their mean key (TriForce, arXiv 2404.11912), and together with lookup
is its three-level hierarchy. The drafter reads no prompt: it takes what the target has read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rapid_llm.config import SpeculationConfig
from rapid_llm.engine.forward import Forward
from rapid_llm.engine.kv_cache import PreallocatedLayer
from rapid_llm.engine.session import PrefillProgress, Session
from rapid_llm.errors import InvalidParameterError
from rapid_llm.speculation.drafters.rag import RagDrafter
from rapid_llm.speculation.sampling import Sampler

BUDGET = 512
"""Tokens of the prompt that are kept."""

_SINKS = 4  # first tokens, which attention leans on whatever they say (StreamingLLM)
_CHUNK = 8  # tokens chosen together (TriForce)

Selection = Callable[[PreallocatedLayer], Tensor]
"""Positions that a layer keeps, ascending: int64 ``[kv_heads, kept]``."""


def streaming(layer: PreallocatedLayer) -> Tensor:
    """The first tokens and the latest."""
    device = layer.keys.device
    kept = torch.arange(layer.length - min(BUDGET, layer.length), layer.length, device=device)
    kept[:_SINKS] = torch.arange(min(_SINKS, len(kept)), device=device)
    return kept.expand(layer.keys.shape[1], -1)


def triforce(layer: PreallocatedLayer) -> Tensor:
    """The latest chunk, and those whose mean key the last query scores highest.

    A KV head's score is the highest among the query heads that share it.
    """
    keys = layer.keys[0, :, : layer.length]
    kv_heads, length, dim = keys.shape
    chunks = length // _CHUNK
    if length <= BUDGET:
        return torch.arange(length, device=keys.device).expand(kv_heads, -1)
    assert layer.last_query is not None
    means = keys[:, length - chunks * _CHUNK :].view(kv_heads, chunks, _CHUNK, dim).mean(dim=2)
    scores = (layer.last_query.view(kv_heads, -1, dim) @ means.transpose(1, 2)).amax(dim=1)
    scores[:, -1] = float("inf")
    best = scores.topk(BUDGET // _CHUNK, dim=-1).indices.sort(dim=-1).values
    first = length - chunks * _CHUNK + best * _CHUNK
    return (first[:, :, None] + torch.arange(_CHUNK, device=keys.device)).flatten(1)


SELECTIONS: dict[str, Selection] = {"streaming": streaming, "triforce": triforce}


def require_compressible(forward: Forward, drafting: str) -> None:
    """Raises InvalidParameterError if a part of this model's KV would not do."""
    if not forward.lean or forward.slides:
        raise InvalidParameterError(
            f"drafting={drafting!r} needs a model of the Llama family that runs our attention and "
            f"has no sliding window, which {forward.name} is not; use drafting='rag' or 'rest'"
        )


class CompressedDrafter(RagDrafter):
    """Drafts over the part of the target's KV that a selection keeps.

    Args:
        target: the target's session; its prompt must be read before this drafter's prefill.
        forward: the target's model, or its int8 twin.
        prompt: the target's.
        selection: what to keep.
        sampler, config: as for :class:`RagDrafter`.
    """

    def __init__(
        self,
        target: Session,
        forward: Forward,
        prompt: Sequence[int],
        selection: Selection,
        sampler: Sampler,
        config: SpeculationConfig,
    ) -> None:
        room = target.cache.capacity - len(prompt)
        cache = forward.new_cache(min(len(prompt), BUDGET) + room)
        super().__init__(
            Session(forward, cache),
            prompt,
            sampler,
            forward.vocab_size,
            config,
        )
        self._target = target
        self._selection = selection

    @property
    def prompt_tokens(self) -> int:
        return min(len(self._prompt), BUDGET)

    def prefill(self, progress: PrefillProgress | None) -> None:
        """Copy what is kept; no model runs."""
        whole, kept = self._target.cache, self._session.cache
        kept.rollback(0)
        if whole.length == 0:
            return  # a prompt of one token, which the first round reads
        for layer, part in zip(whole.layers, kept.layers, strict=True):
            index = self._selection(layer)[None, :, :, None]
            tensors = layer.keys, layer.values
            part.update(*(t.gather(2, index.expand(-1, -1, -1, t.shape[-1])) for t in tensors))
        kept.skipped = whole.length - kept.length
