"""How passes round, beside the sizes of the passes: other kernels add up in another order.

KV that is kept serves only passes that round as those which made it, so that an answer is the same
whether its prompt was read now or before.
"""

from __future__ import annotations

import torch

from rapid_llm.engine.device import device_of
from rapid_llm.engine.model_runner import ModelRunner


def rounding(runner: ModelRunner) -> str:
    """Names what decides the roundings of a model's passes in this thread, at this moment."""
    device = runner.device
    return " | ".join(
        [
            f"torch {torch.__version__}",
            device_of(device).rounding(device),
            f"{torch.get_float32_matmul_precision()} precision",
            f"attention {runner.attn_implementation}",
            " ".join(type(each).__name__ for each in runner.passes),
        ]
    )
