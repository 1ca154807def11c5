"""How passes are computed on a CUDA device."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from rapid_llm.engine import sdpa
from rapid_llm.engine.cuda import has_kernels, int4, prefill
from rapid_llm.engine.device import Device, Pass
from rapid_llm.engine.identity import ModelState
from rapid_llm.engine.lean import has_fixed_rotary

_PLANNED = 1024  # tokens: cuDNN makes, and keeps, plans for each size of buffers


class CUDA(Device):
    """Triton kernels and captured passes, on Ampere or newer; PyTorch's operators elsewhere."""

    quantizers: ClassVar = {"int4": int4}
    prefill_chunk = prefill.CHUNK
    prefill_pieces = (512, 256)  # fewer tokens take about as long; more passes, more launches

    def passes(self, model: Any, state: ModelState, cuda_graphs: bool | None) -> list[Pass]:
        place = model.model.embed_tokens.weight.device
        if cuda_graphs is False or not has_kernels(place) or not has_fixed_rotary(model):
            return []
        # Triton, which may be missing:
        from rapid_llm.engine.cuda.captured import EagerPass
        from rapid_llm.engine.cuda.replayed import ReplayedPasses

        captured = ReplayedPasses(model, insist=cuda_graphs is True)
        state.look()  # projections were fused: their weights have moved
        return [captured, EagerPass(captured)]

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None
    ) -> sdpa.Kernel:
        # Never a mask tensor, and never SDPA over a cache that grows token by token.
        if prefill.serves(query, value.shape[1], window):
            return prefill.attend_chunk
        few = query.shape[1] <= sdpa.FEW_QUERIES
        fused = not few and window is None and query.dtype != torch.float32
        if fused or query.shape[2] != value.shape[2] or not has_kernels(query.device):
            return sdpa.attend
        from rapid_llm.engine.cuda import attention

        return attention.attend

    def capacity_for(self, tokens: int) -> int:
        return tokens + -tokens % _PLANNED

    def upload(self, tokens: Tensor, device: torch.device) -> Tensor:
        return tokens.pin_memory().to(device, non_blocking=True)

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)

    def rounding(self, device: torch.device) -> str:
        return torch.cuda.get_device_name(device)
