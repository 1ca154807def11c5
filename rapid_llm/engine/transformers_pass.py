"""The model's own forward, over our cache: what every other pass is measured by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from rapid_llm.engine.identity import ModelState
from rapid_llm.engine.kv_cache import KVCache, cache_argument


class TransformersPass:
    """Calls the model, whatever it is; see :class:`rapid_llm.engine.device.Pass`.

    Args:
        model: a decoder-only transformers model.
        state: the model's.
        attn_implementation: as transformers names it; the model has it during the pass only.
    """

    def __init__(self, model: PreTrainedModel, state: ModelState, attn_implementation: str) -> None:
        self._model = model
        self._state = state
        self._config = model.config.get_text_config()
        self._attn_implementation = attn_implementation

    def serves(self, ids: Tensor, cache: KVCache, keep: int) -> bool:
        return True

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache, keep: int) -> Tensor:
        with self._attention(), self._turned_for(positions[len(ids) :]):
            output = self._model(
                input_ids=ids[None],
                position_ids=positions[None, : len(ids)],
                use_cache=True,
                logits_to_keep=keep,
                **{cache_argument(self._model.forward): cache},
            )
        logits: Tensor = output.logits[0]
        return logits

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Our attention for one pass only: the caller's own use of the model must not change."""
        configs: list[Any] = [c for c in self._state.configs if type(c) is type(self._config)]
        before = [config._attn_implementation for config in configs]
        for config in configs:  # a module that was copied has its own
            config._attn_implementation = self._attn_implementation
        try:
            yield
        finally:
            for config, name in zip(configs, before, strict=True):
                config._attn_implementation = name

    @contextmanager
    def _turned_for(self, last: Tensor) -> Iterator[None]:
        """The model's rotary embedding as for a sequence up to a position, ``[1]`` or none."""
        with ExitStack() as hooks:
            for module in self._model.modules() if len(last) else ():
                if hasattr(module, "rope_type"):
                    longer = partial(_with_position, last)
                    hooks.enter_context(
                        _removed(module.register_forward_pre_hook(longer, with_kwargs=True))
                    )
                    hooks.enter_context(_removed(module.register_forward_hook(_without_last)))
            yield


def _with_position(
    last: Tensor, module: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a rotary embedding, (x, position_ids, …), with one more position."""
    given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | options
    given["position_ids"] = torch.cat([given["position_ids"], last[None]], dim=1)
    return (), given


def _without_last(module: torch.nn.Module, args: Any, output: tuple[Tensor, ...]) -> Any:
    return tuple(part[:, :-1] for part in output)


@contextmanager
def _removed(hook: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()
