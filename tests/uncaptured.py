"""The CUDA engine on a CPU: uncaptured, with its kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from rapid_llm.engine.cpu.device import CPU
from rapid_llm.engine.cuda import device as cuda_device
from rapid_llm.engine.cuda import graphs
from rapid_llm.engine.cuda.device import CUDA


class Again:
    """In the place of captured work and of its graph: runs it anew, into the same memory."""

    def __init__(self, run):
        self.graph, self.run, self.result = self, run, None

    def replay(self):
        Live.launched += 1
        fresh = self.run()
        self.result = fresh.clone() if self.result is None else self.result.copy_(fresh)


class Live:
    """In the place of a capture."""

    made: int
    launched: int

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self, run, changes, generator):
        Live.made += 1
        return Again(run)


def take_the_place_of_captures(monkeypatch: pytest.MonkeyPatch) -> type[Live]:
    """Forward passes take the CUDA engine's path on a CPU."""
    Live.made = Live.launched = 0
    monkeypatch.setattr(graphs, "GraphCapture", Live)
    monkeypatch.setattr(cuda_device, "has_kernels", lambda device: True)
    monkeypatch.setattr(CPU, "passes", CUDA.passes)
    return Live
