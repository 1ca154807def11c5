"""Configs of a retriever's runs, so that traces show them inside or beside an LLM's run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from langchain_core.callbacks import AsyncCallbackManager, CallbackManager
from langchain_core.callbacks.manager import BaseRunManager
from langchain_core.runnables import RunnableConfig

Manager = TypeVar("Manager", CallbackManager, AsyncCallbackManager)


def child_of(run: BaseRunManager | None, manager: type[Manager]) -> RunnableConfig:
    """Config of a run inside an LLM's run, which LangChain's managers of LLM runs cannot make."""
    if run is None:
        return RunnableConfig()
    child = manager(handlers=[], parent_run_id=run.run_id)
    child.set_handlers(run.inheritable_handlers)
    child.add_tags(run.inheritable_tags)
    child.add_metadata(run.inheritable_metadata)
    return RunnableConfig(callbacks=child)


def beside(config: Mapping[str, Any] | None) -> RunnableConfig:
    """Config of a run beside an LLM's run: that of the LLM's run without name and id."""
    inherited = ("callbacks", "tags", "metadata", "configurable")
    given = {name: value for name, value in (config or {}).items() if name in inherited}
    return cast(RunnableConfig, given)
