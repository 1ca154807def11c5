"""The CUDA implementation of ``Device``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from rapid_llm.engine import sdpa
from rapid_llm.engine.cuda import has_kernels, int4, prefill, refusal
from rapid_llm.engine.cuda.streams import streams_of
from rapid_llm.engine.device import Device, Pass
from rapid_llm.engine.lean import has_fixed_rotary
from rapid_llm.engine.model_state import ModelState

_PLANNED = 1024  # capacities are multiples of this, as cuDNN keeps a plan for each buffer size


class CUDA(Device):
    """CUDA device: Triton kernels and captured passes on Ampere or newer, else PyTorch's operators.

    Older GPUs, and machines without Triton, run the lean pass with SDPA.
    """

    own_memory = True
    quantizers: ClassVar = {"int4": int4}
    prefill_chunk = prefill.CHUNK
    prefill_pieces = (512, 256)  # fewer tokens take about as long; more passes, more launches

    def passes(self, model: Any, state: ModelState, cuda_graphs: bool | None) -> list[Pass]:
        place = model.model.embed_tokens.weight.device
        if cuda_graphs is False or not has_kernels(place) or not has_fixed_rotary(model):
            return []
        # Imported here, because Triton may be missing.
        from rapid_llm.engine.cuda.captured import EagerPass
        from rapid_llm.engine.cuda.replayed import ReplayedPasses

        captured = ReplayedPasses(model, insist=cuda_graphs is True)
        state.look()  # fusing projections has moved their weights
        return [captured, EagerPass(captured)]

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None
    ) -> sdpa.Kernel:
        # No mask tensors, and no SDPA while decoding over a growing cache.
        if prefill.serves(query, value.shape[1], window):
            return prefill.attend_chunk
        few = query.shape[1] <= sdpa.FEW_QUERIES
        fused = not few and window is None and query.dtype != torch.float32
        if fused or query.shape[2] != value.shape[2] or not has_kernels(query.device):
            return sdpa.attend
        from rapid_llm.engine.cuda import attention

        return attention.attend

    def attend_part(self, query: Tensor, value: Tensor) -> sdpa.PartKernel:
        if query.shape[2] != value.shape[2] or not has_kernels(query.device):
            return sdpa.attend_part
        from rapid_llm.engine.cuda import attention

        return attention.attend_part

    def capacity_for(self, tokens: int) -> int:
        return tokens + -tokens % _PLANNED

    def upload(self, tokens: Tensor, device: torch.device) -> Tensor:
        return tokens.pin_memory().to(device, non_blocking=True)

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def free_host_buffers(self) -> None:
        # PyTorch keeps pinned buffers for later ones of the same size.
        free = getattr(torch._C, "_host_emptyCache", None)
        if free is not None:
            free()

    def queued(self, device: torch.device) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event

    def transfer(
        self, pairs: Iterable[tuple[Tensor, Tensor]], device: torch.device, after: Any
    ) -> None:
        # A separate stream, so that passes run meanwhile. The host waits for its end, because
        # memory of both sides may be reused afterwards.
        stream = streams_of(device).copies
        stream.wait_event(after)
        with torch.cuda.stream(stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
        stream.synchronize()

    def kernels(self, device: torch.device) -> dict[str, str | None]:
        return {
            "Triton kernels, CUDA graphs, 4-bit weights": refusal(device),
            "prefill by cuDNN in parts": prefill.refusal(device),
        }

    def rounding(self, device: torch.device) -> str:
        return torch.cuda.get_device_name(device)
