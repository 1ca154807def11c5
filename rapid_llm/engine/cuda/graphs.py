"""CUDA graphs: what a function launches, recorded once and launched as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

MAX_TOKENS = 17
"""In a pass: a draft of 16 tokens and the one before it."""

_WARM_UP = 2  # runs before a capture, in which libraries set up what may not happen in one

Replay = Callable[[], Tensor]


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: cuBLAS keeps 32 MiB for each that it has worked on."""
    return torch.cuda.Stream(device)


class GraphCapture:
    """Records CUDA graphs into one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, run: Replay, changes: Sequence[Tensor], generator: torch.Generator | None
    ) -> Replay:
        before = [tensor.clone() for tensor in changes]
        drawn = None if generator is None else generator.get_state()

        def again() -> None:
            for tensor, value in zip(changes, before, strict=True):
                tensor.copy_(value)

        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        with torch.cuda.device(self._device):
            here, aside = torch.cuda.current_stream(), _aside(self._device)
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):
                    run()
                    again()
                torch.cuda.synchronize()
                # Other threads may go on using the device meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    out = run()
                finally:
                    graph.capture_end()
            here.wait_stream(aside)
        if generator is not None and drawn is not None:
            generator.set_state(drawn)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
