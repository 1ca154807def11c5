"""How passes round, beside the sizes of the passes: other kernels add up in another order.

KV that is kept serves only passes that round as those which made it, so that an answer is the same
whether its prompt was read now or before.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

from rapid_llm.engine import native
from rapid_llm.engine.forward import Forward


def rounding(forward: Forward) -> str:
    """Names what decides the roundings of a model's passes in this thread, at this moment."""
    device = forward.device
    library = native.kernels()
    return " | ".join(
        [
            f"torch {torch.__version__}",
            torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            _processor(),
            torch.backends.cpu.get_cpu_capability(),
            f"{torch.get_num_threads()} threads",
            f"{torch.get_float32_matmul_precision()} precision",
            f"attention {forward.attn_implementation}",
            f"kernels {'none' if library is None else Path(library._name).stem}",
            f"compiled {forward.compiled}, graphs {forward.cuda_graphs}",
        ]
    )


@cache
def _processor() -> str:
    """The CPU's name; on Linux :mod:`platform` knows its architecture only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
