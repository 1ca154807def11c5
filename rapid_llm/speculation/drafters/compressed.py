"""Drafting with the target itself over a small part of its own KV cache.

*streaming* keeps the first tokens and the latest ones (StreamingLLM, arXiv 2309.17453; as a
drafter in MagicDec, arXiv 2408.11049). *triforce* keeps the chunks that the end of the prompt
attends to most, chosen by their mean key (TriForce, arXiv 2404.11912), and together with lookup
is its three-level hierarchy. The drafter reads no prompt: it takes what the target has read.
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
from rapid_llm.engine.session import PrefillProgress, Session
from rapid_llm.engine.transformers_pass import TransformersPass
from rapid_llm.errors import InvalidParameterError
from rapid_llm.speculation.drafters.rag import RagDrafter
from rapid_llm.speculation.sampling import Sampler

BUDGET = 512
"""Tokens of the prompt that are kept."""

_SINKS = 4  # first tokens, which attention leans on whatever they say (StreamingLLM)
_CHUNK = 8  # tokens chosen together (TriForce)


def streaming(layer: PreallocatedLayer) -> Tensor:
    """The first tokens and the latest: int64 ``[kv_heads, kept]``, ascending."""
    device = layer.keys.device
    kept = torch.arange(layer.length - min(BUDGET, layer.length), layer.length, device=device)
    kept[:_SINKS] = torch.arange(min(_SINKS, len(kept)), device=device)
    return kept.expand(layer.keys.shape[1], -1)


def triforce(layer: PreallocatedLayer, query: Tensor) -> Tensor:
    """The latest chunk, and those whose mean key a query ``[heads, dim]`` scores highest.

    A KV head's score is the highest among the query heads that share it.

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
    """Raises InvalidParameterError if a part of this model's KV would not do."""
    if not runner.lean or runner.slides:
        raise InvalidParameterError(
            f"drafting={drafting!r} needs a model of the Llama family that runs our attention and "
            f"has no sliding window, which {runner.name} is not; use drafting='rag' or 'rest'"
        )


class CompressedDrafter(RagDrafter, ABC):
    """Drafts over a part of the target's KV.

    Args:
        target: the target's session; its prompt must be read before this drafter's prefill.
        runner: the target's model, or its quantized copy.
        prompt: the target's.
        sampler, config: as for :class:`RagDrafter`.
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
            Session(runner, cache),
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

    def prefill(self, progress: PrefillProgress | None) -> None:
        """Copy what is kept."""
        whole, kept = self._target.cache, self._session.cache
        kept.rollback(0)
        if whole.length == 0:
            return  # a prompt of one token, which the first round reads
        for layer, part, positions in zip(whole.layers, kept.layers, self._kept(), strict=True):
            index = positions[None, :, :, None]
            tensors = layer.keys, layer.values
            part.update(*(t.gather(2, index.expand(-1, -1, -1, t.shape[-1])) for t in tensors))
        kept.position_offset = whole.length - kept.length


class StreamingDrafter(CompressedDrafter):
    """Keeps what :func:`streaming` does; no model runs for it."""

    def _kept(self) -> list[Tensor]:
        return [streaming(layer) for layer in self._target.cache.layers]


class TriforceDrafter(CompressedDrafter):
    """Keeps what :func:`triforce` does, by the queries of the last token that the target has read.

    That token is read once more, by the model's own forward, as no other pass gives its queries.
    """

    def _kept(self) -> list[Tensor]:
        layers = self._target.cache.layers
        return [triforce(*each) for each in zip(layers, self._queries(), strict=True)]

    def _queries(self) -> list[Tensor]:
        """Of each layer, rotated: ``[heads, dim]``. The target's cache is left as it was."""
        runner, cache = self._target.runner, self._target.cache
        last = cache.length - 1
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        before = [t[:, :, last].clone() for t in tensors]
        run = TransformersPass(runner.model, runner.state, _RECORDING)
        with runner.lock, _recording() as queries:
            cache.rollback(last)
            position = torch.tensor([last], device=runner.device)
            run(runner.tensor(self._prompt[last : last + 1]), position, cache, 1)
        for tensor, value in zip(tensors, before, strict=True):
            tensor[:, :, last] = value  # a pass of another size has rounded otherwise
        return queries


DRAFTERS: dict[str, type[CompressedDrafter]] = {
    "streaming": StreamingDrafter,
    "triforce": TriforceDrafter,
}
"""By the value of ``SpeculationConfig.drafting``."""

_RECORDING = "rapid_recording"
_queries: ContextVar[list[Tensor]] = ContextVar("queries")


@contextmanager
def _recording() -> Iterator[list[Tensor]]:
    """The last query of each layer that attends under the name of ``_RECORDING``, as they run."""
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
