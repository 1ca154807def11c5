"""CUDA graphs: what a function launches, recorded once and launched as one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache

import torch
from torch import Tensor

from rapid_llm.errors import InvalidParameterError

MAX_TOKENS = 17
"""In a pass: a draft of 16 tokens and the one before it."""

_WARM_UP = 2  # runs before a capture, in which libraries set up what may not happen in one

Replay = Callable[[], Tensor]

_log = logging.getLogger(__name__)


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
            try:
                with torch.cuda.stream(aside):
                    for _ in range(_WARM_UP):
                        run()
                        again()
                    torch.cuda.synchronize()
                    out = self._record(graph, run)
            except BaseException:
                here.wait_stream(aside)
                again()
                raise
            here.wait_stream(aside)
        if generator is not None and drawn is not None:
            generator.set_state(drawn)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _record(self, graph: torch.cuda.CUDAGraph, run: Replay) -> Tensor:
        # Other threads may go on using the device meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            out = run()
            graph.capture_end()
        except BaseException:
            self._abandon(graph)
            raise
        return out

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed. Where CUDA calls it invalid, PyTorch leaves its pool open."""
        with suppress(RuntimeError):
            graph.capture_end()
            return
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            torch._C._cuda_releasePool(self._device.index, self._pool)


class Recorder:
    """Records the graphs of one model, and knows what to do where that fails.

    Memory that is short is the caller's to free: the error is passed on, and not again before a
    capture has succeeded. What fails all the same is launched kernel by kernel from then on, and
    the log says so once.

    Args:
        device: of the model.
        insist: raise instead.
    """

    def __init__(self, device: torch.device, insist: bool) -> None:
        self._device = device
        self._insist = insist
        self._capture = GraphCapture(device)
        self._short = self._told = False

    def __call__(
        self, run: Replay, changes: Sequence[Tensor], generator: torch.Generator | None
    ) -> Replay | None:
        """As :class:`GraphCapture`; None where ``run`` cannot be captured.

        A ``generator`` is then of no more use: it may be left as in the middle of a capture.

        Raises:
            torch.OutOfMemoryError: try again when memory was freed.
            InvalidParameterError: graphs were insisted on.
        """
        if self._short and self._device.type == "cuda":
            torch.cuda.empty_cache()  # a capture cannot take from what is cached
        try:
            replay = self._capture(run, changes, generator)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) and not self._short:
                self._short = True
                raise
            self._capture = GraphCapture(self._device)  # with a pool that no failure has touched
            if self._insist:
                raise InvalidParameterError(
                    f"cuda_graphs=True, but a pass on {self._device} could not be captured "
                    f"({error}); leave cuda_graphs out, and it is launched kernel by kernel"
                ) from error
            if not self._told:
                _log.warning(
                    "a pass on %s could not be captured (%s), so it is slower", self._device, error
                )
                self._told = True
            return None
        self._short = False
        return replay


class Graphs:
    """Graphs of one kind of work, each made when it is first needed.

    Args:
        record: makes them.
        device: where the work is done.
    """

    generator: torch.Generator | None = None

    def __init__(self, record: Recorder, device: torch.device) -> None:
        self._record = record
        self._device = device
        self._replays: dict[Hashable, Replay] = {}
        self._uncaptured: set[Hashable] = set()

    def __call__(self, key: Hashable, run: Replay, changes: Sequence[Tensor] = ()) -> Tensor:
        """Launch what ``run`` launched when it was called under this key for the first time.

        Where that could not be captured, call it.

        Returns:
            What it returned then, in the same memory: the next launch may overwrite it.
        """
        if key not in self._replays and key not in self._uncaptured:
            self._make(key, run, changes)
        if key in self._replays:
            return self._replays[key]()
        index = self._device.index if self._device.type == "cuda" else -1
        with torch.cuda.device(index):  # on which Triton launches
            return run()

    def _make(self, key: Hashable, run: Replay, changes: Sequence[Tensor]) -> None:
        replay = self._record(run, changes, self.generator)
        if replay is None:
            self._uncaptured.add(key)
        else:
            self._replays[key] = replay


class DrawingGraphs(Graphs):
    """Graphs of work that draws.

    Attributes:
        generator: what they draw from: one of their own, as a graph draws from the generator that
            it was recorded with.
    """

    generator: torch.Generator

    def __init__(self, record: Recorder, device: torch.device) -> None:
        super().__init__(record, device)
        self.generator = self._new_generator()

    def _new_generator(self) -> torch.Generator:
        with torch.inference_mode(False):
            return torch.Generator(self._device)

    def _make(self, key: Hashable, run: Replay, changes: Sequence[Tensor]) -> None:
        drawn = self.generator.get_state()
        super()._make(key, run, changes)
        if key in self._uncaptured:
            # Those that were recorded with the generator go with it, and are made again.
            self._replays.clear()
            self.generator = self._new_generator()
            self.generator.set_state(drawn)

    @contextmanager
    def drawing_from(self, generator: torch.Generator) -> Iterator[None]:
        """What is launched draws as if from this one, which is left behind those draws."""
        self.generator.set_state(generator.get_state())
        yield
        generator.set_state(self.generator.get_state())
