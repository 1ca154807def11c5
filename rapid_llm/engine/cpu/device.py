"""The CPU implementation of ``Device``."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rapid_llm.engine import sdpa
from rapid_llm.engine.cpu import attention, kernels, products
from rapid_llm.engine.cpu.compiled import compiled_pass
from rapid_llm.engine.cpu.quantizers import CPUQuantizer
from rapid_llm.engine.device import Device, Pass
from rapid_llm.engine.model_state import ModelState


class CPU(Device):
    """CPU device: compiled kernels where available, PyTorch's operators elsewhere."""

    quantizers: ClassVar = {"int4": CPUQuantizer(4), "int8": CPUQuantizer(8)}

    def passes(self, model: Any, state: ModelState, cuda_graphs: bool | None) -> list[Pass]:
        found = compiled_pass(model)
        return [] if found is None else [found]

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None
    ) -> sdpa.Kernel:
        return attention.attention(query, key, value, window)

    def attend_part(self, query: Tensor, value: Tensor) -> sdpa.PartKernel:
        return attention.attend_part

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return products.linear(x, weight, bias)

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return products.fast_dtype(dtype)

    def kernels(self, device: torch.device) -> dict[str, str | None]:
        compiled = {f"compiled kernels, {n}": why for n, why in kernels.refusals().items()}
        slow = "this CPU has no instructions for them; float32 products are used"
        fast = products.fast_dtype(torch.bfloat16) == torch.bfloat16
        return {**compiled, "bfloat16 matrix products": None if fast else slow}

    def rounding(self, device: torch.device) -> str:
        library = kernels.kernels()
        return " | ".join(
            [
                _processor(),
                torch.backends.cpu.get_cpu_capability(),
                f"{torch.get_num_threads()} threads",
                f"kernels {'none' if library is None else Path(library._name).stem}",
            ]
        )


@cache
def _processor() -> str:
    """Name of the CPU; from /proc on Linux, where :mod:`platform` gives the architecture only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
