"""Decoders that are loaded by their options at first use, and shared by the copies of an object."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rapid_llm.config import EngineConfig
from rapid_llm.forked import Owner, ProcessLock

if TYPE_CHECKING:
    from rapid_llm.decoder import RapidDecoder


def _load(config: EngineConfig) -> RapidDecoder:
    from rapid_llm.decoder import RapidDecoder  # imports torch

    return RapidDecoder.from_config(config)


class LoadedDecoders:
    """Loaded decoders by their configs.

    Copies are the same object; a pickle is empty, and so is a forked process's.
    """

    def __init__(self) -> None:
        self._empty()
        self._lock = ProcessLock()

    def _empty(self) -> None:
        self._decoders: list[tuple[EngineConfig, RapidDecoder]] = []
        self._loaded_in = Owner("the models")

    def find(self, config: EngineConfig) -> RapidDecoder | None:
        """The decoder of a config if it is loaded."""
        if not self._loaded_in.here:
            return None
        return next((decoder for known, decoder in self._decoders if known == config), None)

    def get(
        self, config: EngineConfig, load: Callable[[EngineConfig], RapidDecoder] = _load
    ) -> RapidDecoder:
        """The decoder of a config, loaded at the first use, once also for calls at once.

        Args:
            config: models and engine options.
            load: function that loads the decoder of a config.

        Raises:
            ModelError: a model cannot be loaded.
        """
        with self._lock:
            if not self._loaded_in.here:
                self._empty()
            decoder = self.find(config)
            if decoder is None:
                decoder = load(config)
                self._decoders.append((config, decoder))
            return decoder

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoadedDecoders)  # objects are equal whatever they have loaded

    __hash__ = None  # type: ignore[assignment]

    def __copy__(self) -> LoadedDecoders:
        return self

    def __deepcopy__(self, memo: object) -> LoadedDecoders:
        return self

    def __reduce__(self) -> tuple[type[LoadedDecoders], tuple[()]]:
        return LoadedDecoders, ()
