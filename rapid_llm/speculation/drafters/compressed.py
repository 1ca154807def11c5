"""Drafters that run the target over a small part of its own KV cache: streaming and triforce.

*streaming* keeps the first and the latest tokens (StreamingLLM, arXiv 2309.17453; as a drafter in
MagicDec, arXiv 2408.11049). *triforce* keeps the chunks of KV that the end of the prompt attends to
most, chosen by their mean key (TriForce, arXiv 2404.11912); with lookup it is TriForce's
three-level hierarchy. These drafters read no prompt: they copy KV from the target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from rapid_llm.config import SpeculationConfig
from rapid_llm.engine.attention import attend
from rapid_llm.engine.kv_cache import PreallocatedLayer
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.session import Session
from rapid_llm.engine.steps import Steps
from rapid_llm.engine.transformers_pass import TransformersPass
from rapid_llm.errors import InvalidParameterError
from rapid_llm.progress import Progress
from rapid_llm.speculation.drafters.rag import RagDrafter
from rapid_llm.speculation.sampling import Sampler

BUDGET = 512
"""Number of prompt tokens whose KV is kept."""

_SINKS = 4  # attention sinks: first tokens, kept whatever they are (StreamingLLM)
_CHUNK = 8  # tokens per chunk of KV, chosen together (TriForce)


def streaming(layer: PreallocatedLayer) -> Tensor:
    """Positions of the first and the latest tokens: int64 ``[kv_heads, kept]``, ascending."""
    device = layer.keys.device
    kept = torch.arange(layer.length - min(BUDGET, layer.length), layer.length, device=device)
    kept[:_SINKS] = torch.arange(min(_SINKS, len(kept)), device=device)
    return kept.expand(layer.keys.shape[1], -1)


def triforce(layer: PreallocatedLayer, query: Tensor) -> Tensor:
    """Positions of the latest chunk and of those whose mean key a query scores highest.

    The score of a KV head is the highest among the query heads that share it.

    Args:
        layer: KV of a layer.
        query: ``[heads, dim]``.

    Returns:
        Positions, int64 ``[kv_heads, kept]``, ascending.
    """
    keys = layer.keys[0, :, : layer.length]
    kv_heads, length, dim = keys.shape
    chunks = length // _CHUNK
    if length <= BUDGET:
        return torch.arange(length, device=keys.device).expand(kv_heads, -1)
    means = keys[:, length - chunks * _CHUNK :].view(kv_heads, chunks, _CHUNK, dim).mean(dim=2)
    scores = (query.view(kv_heads, -1, dim) @ means.transpose(1, 2)).amax(dim=1)
    scores[:, -1] = float("inf")
    best = scores.topk(BUDGET // _CHUNK, dim=-1).indices.sort(dim=-1).values
    first = length - chunks * _CHUNK + best * _CHUNK
    return (first[:, :, None] + torch.arange(_CHUNK, device=keys.device)).flatten(1)


def require_compressible(runner: ModelRunner, drafting: str) -> None:
    """Check that a model can draft over a part of its KV.

    Raises:
        InvalidParameterError: it is not of the Llama family with our attention, or has a sliding
            window.
    """
    if not runner.lean or runner.slides:
        raise InvalidParameterError(
            f"drafting={drafting!r} needs a model of the Llama family that runs our attention and "
            f"has no sliding window, which {runner.name} is not; use drafting='rag' or 'rest'"
        )


class CompressedDrafter(RagDrafter, ABC):
    """Drafts over a part of the target's KV.

    Args:
        target: the target's session; its prefill must precede this drafter's.
        runner: runner of the target, or of its quantized copy.
        prompt: token ids of the target's prompt.
        sampler, config: see :class:`RagDrafter`.
    """

    def __init__(
        self,
        target: Session,
        runner: ModelRunner,
        prompt: Sequence[int],
        sampler: Sampler,
        config: SpeculationConfig,
    ) -> None:
        room = target.cache.capacity - len(prompt)
        cache = runner.new_cache(min(len(prompt), BUDGET) + room)
        super().__init__(
            Session(runner, cache, joined=target.joined),
            prompt,
            sampler,
            runner.vocab_size,
            config,
        )
        self._target = target

    @property
    def prompt_tokens(self) -> int:
        return min(len(self._prompt), BUDGET)

    @abstractmethod
    def _kept(self) -> list[Tensor]:
        """Positions that each layer keeps, ascending: int64 ``[kv_heads, kept]``."""

    def reading(self, progress: Progress | None) -> Steps[None]:
        """Copy the kept KV from the target."""
        yield from ()  # no pass
        whole, kept = self._target.cache, self._session.cache
        kept.rollback(0)
        if whole.length == 0:
            return  # the prompt is one token, which the first round reads
        for layer, part, positions in zip(whole.layers, kept.layers, self._kept(), strict=True):
            index = positions[None, :, :, None]
            tensors = layer.keys, layer.values
            part.update(*(t.gather(2, index.expand(-1, -1, -1, t.shape[-1])) for t in tensors))
        kept.position_offset = whole.length - kept.length


class StreamingDrafter(CompressedDrafter):
    """Keeps the KV at the positions of :func:`streaming`."""

    def _kept(self) -> list[Tensor]:
        return [streaming(layer) for layer in self._target.cache.layers]


class TriforceDrafter(CompressedDrafter):
    """Keeps the KV at the positions of :func:`triforce`, by the queries of the last token read.

    That token is read again by the model's own forward, as no other pass gives its queries.
    """

    def _kept(self) -> list[Tensor]:
        layers = self._target.cache.layers
        return [triforce(*each) for each in zip(layers, self._queries(), strict=True)]

    def _queries(self) -> list[Tensor]:
        """Rotated queries of each layer, ``[heads, dim]``; the target's cache does not change."""
        runner, cache = self._target.runner, self._target.cache
        last = cache.length - 1
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        before = [t[:, :, last].clone() for t in tensors]
        run = TransformersPass(runner.model, runner.state, _RECORDING)
        try:
            with runner.lock, _recording() as queries:
                cache.rollback(last)
                position = torch.tensor([last], device=runner.device)
                run(runner.tensor(self._prompt[last : last + 1]), position, cache, 1)
        finally:  # also when memory runs out: the prefill is tried again
            cache.rollback(last)
            for tensor, value in zip(tensors, before, strict=True):
                tensor[:, :, last] = value  # a pass of another size rounds differently
            cache.advance(1)
        return queries


DRAFTERS: dict[str, type[CompressedDrafter]] = {
    "streaming": StreamingDrafter,
    "triforce": TriforceDrafter,
}
"""Drafter classes by the value of ``SpeculationConfig.drafting``."""

_RECORDING = "rapid_recording"
_queries: ContextVar[list[Tensor]] = ContextVar("queries")


@contextmanager
def _recording() -> Iterator[list[Tensor]]:
    """List to which each layer with attention ``_RECORDING`` appends its last query."""
    token = _queries.set([])
    try:
        yield _queries.get()
    finally:
        _queries.reset(token)


def _attend_and_record(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    _queries.get().append(query[0, :, -1])
    return attend(query[0], key[0], value[0], scaling).transpose(0, 1)[None], None


AttentionInterface.register(_RECORDING, _attend_and_record)
AttentionMaskInterface.register(_RECORDING, lambda *_, **__: None)
