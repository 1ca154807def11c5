"""Seconds, host calls and time limits of what runs on a device."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

import torch
from transformers.generation.streamers import BaseStreamer

K = TypeVar("K")

_LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cudaLaunchCooperativeKernel",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
)
_GRAPHS = ("cudaGraphLaunch",)
_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


def wait_for(device: torch.device) -> None:
    """Return when everything that was launched there is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch(Generic[K]):
    """Seconds of pieces of work, by key: a GPU's own events, or the clock on a CPU.

    Nothing waits for the device until the samples are asked for, so that the pieces follow one
    another as they do in a generation.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[tuple[K, torch.cuda.Event, torch.cuda.Event]] = []
        self._samples: dict[K, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, key: K) -> Iterator[None]:
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield
            self._samples[key].append(time.perf_counter() - started)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(self._device))
        yield
        end.record(torch.cuda.current_stream(self._device))
        self._events.append((key, start, end))

    def clear(self) -> None:
        """Forget what was done so far, which warmed up."""
        wait_for(self._device)
        self._events.clear()
        self._samples.clear()

    def samples(self) -> dict[K, list[float]]:
        """By key, in the order of the work."""
        wait_for(self._device)
        for key, start, end in self._events:
            self._samples[key].append(start.elapsed_time(end) / 1000)
        self._events.clear()
        return dict(self._samples)


class Calls(NamedTuple):
    """What the host asked of a GPU, each a time the work ran.

    Attributes:
        launches: kernels launched one by one.
        graphs: captured graphs replayed.
        waits: times that the host waited for the device.
    """

    launches: float
    graphs: float
    waits: float


def host_calls(work: Callable[[], object], device: torch.device, times: int = 3) -> Calls:
    """Count what some work on a GPU asks of it, by torch's profiler.

    Raises:
        RuntimeError: the profiler saw nothing.
    """
    activity = torch.profiler.ProfilerActivity
    wait_for(device)
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        for _ in range(times):
            work()
    counts = Counter({event.key: event.count for event in profile.key_averages()})
    calls = Calls(
        *(sum(counts[name] for name in names) / times for names in (_LAUNCHES, _GRAPHS, _WAITS))
    )
    if calls.launches + calls.graphs == 0:
        raise RuntimeError("the profiler saw nothing launched: it may not be allowed to look here")
    return calls


class Stamps(BaseStreamer):
    """When ``generate`` handed out the prompt (at once), then each token or run of tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._sizes: list[int] = []

    @property
    def prefill(self) -> float:
        """Seconds to the first token."""
        return self.times[1] - self.times[0]

    @property
    def per_token(self) -> float:
        """Seconds a token after the first run of them."""
        return (self.times[-1] - self.times[1]) / max(1, sum(self._sizes[2:]))

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self._sizes.append(value.numel())

    def end(self) -> None:
        pass


class OutOfTime(Exception):  # noqa: N818 - says what happened, as StopIteration does
    """A piece of work took longer than it was given."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the work inside by :class:`OutOfTime`: in the main thread, where signals are."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    # Again after a while: what is raised inside a callback or a destructor is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
