"""The pass that calls the model's own forward over our KV cache; the reference for all others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from rapid_llm.engine.kv_cache import KVCache, cache_argument
from rapid_llm.engine.model_state import ModelState


class TransformersPass:
    """Calls a model's own forward; see :class:`rapid_llm.engine.device.Pass`.

    Args:
        model: decoder-only transformers model.
        state: state of the model.
        attn_implementation: attention implementation, set on the model during a pass only.
    """

    def __init__(self, model: PreTrainedModel, state: ModelState, attn_implementation: str) -> None:
        self._model = model
        self._state = state
        self._config = model.config.get_text_config()
        self._attn_implementation = attn_implementation

    def serves(self, ids: Tensor, cache: KVCache, keep: int) -> bool:
        return True

    def __call__(self, ids: Tensor, positions: Tensor, cache: KVCache, keep: int) -> Tensor:
        with self._attention(), self._rotary_for(positions[len(ids) :]):
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
        """Set the attention implementation for one pass; the user's own calls do not change."""
        configs: list[Any] = [c for c in self._state.configs if type(c) is type(self._config)]
        before = [config._attn_implementation for config in configs]
        for config in configs:  # a copied module has its own config
            config._attn_implementation = self._attn_implementation
        try:
            yield
        finally:
            for config, name in zip(configs, before, strict=True):
                config._attn_implementation = name

    @contextmanager
    def _rotary_for(self, last: Tensor) -> Iterator[None]:
        """Make the rotary embedding scale for a longer sequence, during one pass.

        Args:
            last: last position of the sequence, int64 ``[1]``; empty to change nothing.
        """
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
    """Forward pre-hook of a rotary embedding that appends a position to ``position_ids``."""
    given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | options
    given["position_ids"] = torch.cat([given["position_ids"], last[None]], dim=1)
    return (), given


def _without_last(module: torch.nn.Module, args: Any, output: tuple[Tensor, ...]) -> Any:
    """Forward hook of a rotary embedding that removes the appended position from the output."""
    return tuple(part[:, :-1] for part in output)


@contextmanager
def _removed(hook: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()
