"""Configs of runs inside or beside an LLM's run, so that traces show them in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from langchain_core.callbacks import AsyncCallbackManager, CallbackManager
from langchain_core.callbacks.manager import BaseRunManager
from langchain_core.runnables import RunnableConfig

Manager = TypeVar("Manager", CallbackManager, AsyncCallbackManager)


def child_of(run: BaseRunManager | None, manager: type[Manager]) -> RunnableConfig:
    """The config of a run inside an LLM's run; LangChain's own managers make none."""
    if run is None:
        return RunnableConfig()
    child = manager(handlers=[], parent_run_id=run.run_id)
    child.set_handlers(run.inheritable_handlers)
    child.add_tags(run.inheritable_tags)
    child.add_metadata(run.inheritable_metadata)
    return RunnableConfig(callbacks=child)


def beside(config: Mapping[str, Any] | None) -> RunnableConfig:
    """The config of a run beside an LLM's run: its own without name and id."""
    inherited = ("callbacks", "tags", "metadata", "configurable")
    given = {name: value for name, value in (config or {}).items() if name in inherited}
    return cast(RunnableConfig, given)
