"""Time work on a device, count its host calls, and time transformers' ``generate``."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from rapid_llm.engine.device import device_of

_CALLS = {
    "launches": (
        *("cudaLaunchKernel", "cudaLaunchKernelExC", "cudaLaunchCooperativeKernel"),
        *("cuLaunchKernel", "cuLaunchKernelEx"),
    ),
    "graphs": ("cudaGraphLaunch",),
    "waits": ("cudaStreamSynchronize", "cudaEventSynchronize"),
}


def wait_for(device: torch.device) -> None:
    """Wait until all launched work of a device is done."""
    device_of(device).synchronize(device)


class Stopwatch:
    """Times pieces of work by key, with events on a GPU and the clock on a CPU.

    Nothing waits for the device before :meth:`samples`, so that pieces follow one another as in a
    generation.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: dict[Any, list[tuple[Any, Any]]] = defaultdict(list)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def __call__(self, key: Any) -> Iterator[None]:
        start = self._now()
        yield
        self._marks[key].append((start, self._now()))

    def clear(self) -> None:
        """Forget all pieces so far, such as those of a warm-up."""
        self._marks.clear()

    def samples(self) -> dict[Any, list[float]]:
        """Seconds of all pieces by key, in order."""
        wait_for(self._device)
        on_gpu = self._device.type == "cuda"
        return {
            key: [a.elapsed_time(b) / 1000 if on_gpu else b - a for a, b in marks]
            for key, marks in self._marks.items()
        }


def host_calls(work: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Number of host calls of some work on a GPU, by torch's profiler; the mean of three runs.

    Returns:
        Kernels launched one by one (``launches``), captured graphs replayed (``graphs``), and waits
        for the device (``waits``).

    Raises:
        RuntimeError: the profiler saw nothing.
    """
    activity = torch.profiler.ProfilerActivity
    wait_for(device)
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profile:
        for _ in range(3):
            work()
    counts = Counter({event.key: event.count for event in profile.key_averages()})
    calls = {key: sum(counts[name] for name in names) / 3 for key, names in _CALLS.items()}
    if calls["launches"] + calls["graphs"] == 0:
        raise RuntimeError("the profiler saw nothing launched: it may not be allowed to look here")
    return calls


class Stamps(BaseStreamer):
    """Streamer that records when ``generate`` returned the prompt (at once) and its tokens."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._sizes: list[int] = []

    @classmethod
    def of_generate(cls, model: Any, ids: torch.Tensor, tokens: int, **options: Any) -> Stamps:
        """Stamps of a greedy ``generate`` of exactly ``tokens`` tokens from int64 ``[1, n]``."""
        stamps, mask = cls(), torch.ones_like(ids)
        options |= {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
        model.generate(ids, attention_mask=mask, streamer=stamps, **options)
        return stamps

    @property
    def prefill(self) -> float:
        """Seconds to the first token."""
        return self._times[1] - self._times[0]

    @property
    def per_token(self) -> float:
        """Seconds per token after the first token, or first run of tokens."""
        return (self._times[-1] - self._times[1]) / max(1, sum(self._sizes[2:]))

    def put(self, value: torch.Tensor) -> None:
        self._times.append(time.perf_counter())
        self._sizes.append(value.numel())

    def end(self) -> None:
        pass
