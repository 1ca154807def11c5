"""CUDA graphs: what a function launches, recorded once and launched as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
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
        """What replays it.

        Args:
            run: launches the work, and never waits for it.
            changes: what it changes that the next run depends on; left as it was.
            generator: draws; left as it was.
        """
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


class Graphs:
    """Graphs of one kind of work, each made when it is first needed.

    Args:
        capture: records them.
    """

    generator: torch.Generator | None = None

    def __init__(self, capture: GraphCapture) -> None:
        self._capture = capture
        self._replays: dict[Hashable, Replay] = {}

    def __call__(self, key: Hashable, run: Replay, changes: Sequence[Tensor] = ()) -> Tensor:
        """Launch what ``run`` launched when it was called under this key for the first time.

        Returns:
            What it returned then, in the same memory: the next launch overwrites it.
        """
        if key not in self._replays:
            self._replays[key] = self._capture(run, changes, self.generator)
        return self._replays[key]()


class DrawingGraphs(Graphs):
    """Graphs of work that draws.

    Args:
        capture: records them.
        device: where they draw.

    Attributes:
        generator: what they draw from: one of their own, as a graph draws from the generator that
            it was recorded with.
    """

    generator: torch.Generator

    def __init__(self, capture: GraphCapture, device: torch.device) -> None:
        super().__init__(capture)
        with torch.inference_mode(False):
            self.generator = torch.Generator(device)

    @contextmanager
    def drawing_from(self, generator: torch.Generator) -> Iterator[None]:
        """What is launched draws as if from this one, which is left behind those draws."""
        self.generator.set_state(generator.get_state())
        yield
        generator.set_state(self.generator.get_state())
