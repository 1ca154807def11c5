"""Batches: calls that begin together are answered at once, and a common document is read once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import ContextThreadPoolExecutor
from langchain_core.runnables.utils import Input, Output

_Prompt = TypeVar("_Prompt")
_Answer = TypeVar("_Answer")

AT_ONCE: ContextVar[bool] = ContextVar("at_once", default=False)
"""Whether calls are those of a batch, to be answered at once."""


@contextmanager
def at_once() -> Iterator[None]:
    """Context in which calls, of any threads and tasks that begin in it, are those of a batch."""
    before = AT_ONCE.set(True)
    try:
        yield
    finally:
        AT_ONCE.reset(before)


class Batches(Runnable[Input, Output]):
    """A model whose batches are answered at once.

    Each input is a call with its own configuration, tracing and errors, in both classes:
    LangChain's own batch of a text LLM would lose all answers with the first error.
    """

    def batch(
        self,
        inputs: list[Input],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Output]:
        """LangChain's method; the inputs are answered at once, and a common document is read once.

        At most ``max_sequences`` are under way, and no more than ``max_concurrency`` of the config.
        """
        with at_once():
            return Runnable.batch(
                self, inputs, config, return_exceptions=return_exceptions, **kwargs
            )

    async def abatch(
        self,
        inputs: list[Input],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Output]:
        """:meth:`batch` for asyncio."""
        with at_once():
            return await Runnable.abatch(
                self, inputs, config, return_exceptions=return_exceptions, **kwargs
            )


def answers_of(prompts: Sequence[_Prompt], answer: Callable[[_Prompt], _Answer]) -> list[_Answer]:
    """Answers of prompts, at once where they are several."""
    if len(prompts) == 1:
        return [answer(prompts[0])]
    with at_once(), ContextThreadPoolExecutor() as pool:
        return list(pool.map(answer, prompts))


async def aanswers_of(
    prompts: Sequence[_Prompt], answer: Callable[[_Prompt], Coroutine[Any, Any, _Answer]]
) -> list[_Answer]:
    """:func:`answers_of` for asyncio; an error ends the other answers."""
    if len(prompts) == 1:
        return [await answer(prompts[0])]
    with at_once():
        tasks = [asyncio.ensure_future(answer(prompt)) for prompt in prompts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
