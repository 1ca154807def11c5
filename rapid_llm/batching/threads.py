"""Send many requests to a server at once, in a thread each; the server batches them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from rapid_llm.interface import GenerationRequest
from rapid_llm.results import Delta

MOST_THREADS = 32
"""Maximum number of requests under way; further ones wait."""


class _StoppedError(Exception):
    """Nobody waits for the answer any more, whose prompt is still read. Callers never see it."""


def stream_in_threads(
    stream: Callable[..., Iterator[Delta]],
    requests: Sequence[GenerationRequest],
    return_exceptions: bool,
) -> Iterator[tuple[int, Delta | Exception]]:
    """Answer requests at once and yield (index of the request, delta), as they come.

    Args:
        stream: function with the arguments of a request, called in threads.
        requests: the requests.
        return_exceptions: whether an error takes the place of a delta; otherwise it is raised.
    """
    outcomes: SimpleQueue[tuple[int, Delta | Exception]] = SimpleQueue()
    stopped = threading.Event()

    def answer(index: int, request: GenerationRequest) -> None:
        def report(*values: Any) -> None:
            if stopped.is_set():
                raise _StoppedError
            if request.progress is not None:
                request.progress(*values)

        if stopped.is_set():
            return
        try:
            for delta in stream(*request.prompts, **request.options | {"progress": report}):
                outcomes.put((index, delta))
                if stopped.is_set():
                    return  # drops the stream, which ends the request
        except Exception as error:
            outcomes.put((index, error))

    missing = len(requests)
    pool = ThreadPoolExecutor(min(MOST_THREADS, max(1, missing)), "rapid-llm-requests")
    try:
        for index, request in enumerate(requests):
            pool.submit(answer, index, request)
        while missing:
            index, outcome = outcomes.get()
            if isinstance(outcome, Exception):
                if not return_exceptions:
                    raise outcome
                missing -= 1
            else:
                missing -= outcome.finish_reason is not None
            yield index, outcome
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
