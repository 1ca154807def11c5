"""Describe the rounding errors of passes, so that only KV that would be the same is reused.

Other kernels add in another order and round differently. Kept KV is used only by passes that round
like those that computed it, so that an answer is the same with and without reuse.
"""

from __future__ import annotations

import torch

from rapid_llm.engine.device import device_of
from rapid_llm.engine.model_runner import ModelRunner


def rounding(runner: ModelRunner) -> str:
    """Description of everything on which the rounding of a model's passes in this thread depends.

    Passes of different sizes round differently all the same, see :mod:`rapid_llm.engine.chunks`.
    """
    device = runner.device
    return " | ".join(
        [
            f"torch {torch.__version__}",
            device_of(device).rounding(device),
            f"{torch.get_float32_matmul_precision()} precision",
            f"attention {runner.attn_implementation}",
            " ".join(type(each).__name__ for each in runner.passes),
            "one process" if runner.ranks is None else f"{runner.ranks.size} processes",
        ]
    )
