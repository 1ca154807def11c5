"""Capture and replay of CUDA graphs, with a fallback where a capture fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor

from rapid_llm.engine.cuda.streams import streams_of
from rapid_llm.errors import InvalidParameterError
from rapid_llm.forked import ProcessLock

MAX_TOKENS = 17
"""Maximum number of tokens in a captured pass: a draft of 16 tokens and the one before it."""

_WARM_UP = 2  # runs before a capture, for setup work of libraries that cannot be captured

Work = Callable[[], Tensor]
"""Function that launches work on the device, and returns its result without waiting for it."""

_log = logging.getLogger(__name__)

_capturing = ProcessLock()
"""Held during a capture: all models capture on one stream, which records whatever is launched."""


class Captured(NamedTuple):
    """Captured work.

    Attributes:
        graph: launches the work anew by its ``replay``.
        result: result of the work, in memory that each replay overwrites.
    """

    graph: torch.cuda.CUDAGraph
    result: Tensor


class GraphCapture:
    """Captures CUDA graphs in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, run: Work, changes: Sequence[Tensor], generator: torch.Generator | None
    ) -> Captured:
        """Capture work.

        Args:
            run: the work.
            changes: tensors that it changes and the next run depends on; restored afterwards.
            generator: random generator that it uses, restored afterwards; None for none.
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
            here, aside = torch.cuda.current_stream(), streams_of(self._device).captures
            aside.wait_stream(here)
            try:
                with torch.cuda.stream(aside):
                    for _ in range(_WARM_UP):
                        run()
                        again()
                    torch.cuda.synchronize()
                    result = self._record(graph, run)
            except BaseException:
                here.wait_stream(aside)
                again()
                raise
            here.wait_stream(aside)
        if generator is not None and drawn is not None:
            generator.set_state(drawn)
        return Captured(graph, result)

    def _record(self, graph: torch.cuda.CUDAGraph, run: Work) -> Tensor:
        # thread_local, so that other threads can use the device meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = run()
            graph.capture_end()
        except BaseException:
            self._abandon(graph)
            raise
        return result

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a failed capture; release its pool, which PyTorch leaves open if it is invalid."""
        with suppress(RuntimeError):
            graph.capture_end()
            return
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            torch._C._cuda_releasePool(self._device.index, self._pool)


class Recorder:
    """Captures the graphs of one model, with a fallback where a capture fails.

    The first out-of-memory error since a success is raised, so that the caller can free memory and
    try again. After any other failure, or a second one, the work is launched kernel by kernel from
    then on, which is logged once.

    Args:
        device: device of the model.
        insist: whether to raise an error instead of the fallback.
    """

    def __init__(self, device: torch.device, insist: bool) -> None:
        self._device = device
        self._insist = insist
        self._capture = GraphCapture(device)
        self._short = self._warned = False

    def __call__(
        self, run: Work, changes: Sequence[Tensor], generator: torch.Generator | None
    ) -> Captured | None:
        """Capture work, see :class:`GraphCapture`; None where this fails.

        After a failure ``generator`` must not be used again: its state may be that of a capture.

        Raises:
            torch.OutOfMemoryError: memory is short; free some and call again.
            InvalidParameterError: the capture failed, and ``insist`` is set.
        """
        if self._short and self._device.type == "cuda":
            torch.cuda.empty_cache()  # a capture cannot use memory cached by PyTorch
        try:
            with _capturing:
                captured = self._capture(run, changes, generator)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) and not self._short:
                self._short = True
                raise
            self._capture = GraphCapture(self._device)  # with a new pool
            if self._insist:
                raise InvalidParameterError(
                    f"cuda_graphs=True, but a pass on {self._device} could not be captured "
                    f"({error}); leave cuda_graphs out, and it is launched kernel by kernel"
                ) from error
            if not self._warned:
                _log.warning(
                    "a pass on %s could not be captured (%s), so it is slower", self._device, error
                )
                self._warned = True
            return None
        self._short = False
        return captured


class Graphs:
    """Graphs of one kind of work by key, each captured at its first use.

    Args:
        record: recorder that captures them.
        device: device of the work.
    """

    generator: torch.Generator | None = None

    def __init__(self, record: Recorder, device: torch.device) -> None:
        self._record = record
        self._device = device
        self._captured: dict[Hashable, Captured] = {}
        self._uncaptured: set[Hashable] = set()

    def __call__(self, key: Hashable, run: Work, changes: Sequence[Tensor] = ()) -> Tensor:
        """Replay the graph of a key, captured from ``run`` at the first call.

        Args:
            key: key of the graph.
            run: the work; called directly where the capture failed.
            changes: tensors that it changes and the next run depends on.

        Returns:
            The result of ``run``, in memory that the next launch may overwrite.
        """
        key = key, torch.get_float32_matmul_precision()  # a graph keeps that of its capture
        if key not in self._captured and key not in self._uncaptured:
            self._make(key, run, changes)
        if key in self._captured:
            self._captured[key].graph.replay()
            return self._captured[key].result
        index = self._device.index if self._device.type == "cuda" else -1
        with torch.cuda.device(index):  # Triton launches on the current device
            return run()

    def _make(self, key: Hashable, run: Work, changes: Sequence[Tensor]) -> None:
        captured = self._record(run, changes, self.generator)
        if captured is None:
            self._uncaptured.add(key)
        else:
            self._captured[key] = captured


class DrawingGraphs(Graphs):
    """Graphs of work that draws random numbers.

    Attributes:
        generator: random generator of the graphs; their own, because a graph draws from the
            generator that it was captured with.
    """

    generator: torch.Generator

    def __init__(self, record: Recorder, device: torch.device) -> None:
        super().__init__(record, device)
        self.generator = self._new_generator()

    def _new_generator(self) -> torch.Generator:
        with torch.inference_mode(False):
            return torch.Generator(self._device)

    def _make(self, key: Hashable, run: Work, changes: Sequence[Tensor]) -> None:
        drawn = self.generator.get_state()
        try:
            super()._make(key, run, changes)
        finally:
            if key not in self._captured:
                # The generator is not usable any more, nor are the graphs captured with it.
                self._captured.clear()
                self.generator = self._new_generator()
                self.generator.set_state(drawn)

    @contextmanager
    def drawing_from(self, generator: torch.Generator) -> Iterator[None]:
        """Context in which the graphs draw as if from another generator, which advances."""
        self.generator.set_state(generator.get_state())
        yield
        generator.set_state(self.generator.get_state())
