"""Detect changes to a model (weights, adapters, hooks, methods), before each forward pass.

A model belongs to its user, who may add adapters and hooks, replace layers and methods, and edit
weights at any time, also after a decoder was built around it. Kept KV and our own passes are valid
only for the model that they were made for. A check takes a tenth of a millisecond at 32 layers.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from rapid_llm.engine.snapshot import Snapshot


class ModelState:
    """Tracks changes to a model.

    It detects modules and tensors that were added, replaced or moved; tensors edited in place, if
    ``Tensor._version`` counts it; attributes of modules and configs, such as the active adapter;
    hooks; methods replaced on an instance or a class. It does not detect edits through ``.data`` or
    NumPy, or inside a tensor subclass; :meth:`take_samples` detects those that change one of 256
    sampled values of a parameter, as edits of a whole parameter do. Weights that accelerate has
    offloaded are not tracked.

    Args:
        model: the model, which is put into evaluation mode, again after each change.

    Attributes:
        number: number of the model's state at the last check. A state that returns, as when
            adapters are switched back, gets its earlier number.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._known: list[tuple[Any, int]] = []  # (settings, number) for the current weights
        self._samples: list[bytes] | None = None
        self._count = 0
        self._last = Snapshot(model.eval())
        self.number = self._number()

    def look(self) -> int:
        """Check the model for changes; returns the number of its current state."""
        if self._last.outdated():
            if any(module.training for module in self.model.modules()):
                self.model.eval()
            before, self._last = self._last, Snapshot(self.model)
            if not self._last.same_weights(before):
                self._known, self._samples = [], None
            self.number = self._number()
        return self.number

    def take_samples(self) -> int:
        """Like :meth:`look`, and compare a sample of the weights: a millisecond at 32 layers."""
        self.look()
        before, self._samples = self._samples, self._last.samples()
        if before not in (None, self._samples):
            self.renew()
        return self.number

    def renew(self) -> None:
        """Give the current state a new number, after a change that was not detected."""
        self._known = []
        self.number = self._number()

    def absorb(self) -> None:
        """Accept changes that a forward pass made to the model itself; to be called after a pass.

        Scaled rotary embeddings change their frequencies, and some modules count their calls.
        """
        if self._last.outdated():
            now = Snapshot(self.model)
            if now.may_follow(self._last):
                self._last = now
                self._known = [
                    (now.settings if number == self.number else settings, number)
                    for settings, number in self._known
                ]

    def _number(self) -> int:
        settings = self._last.settings
        for known, number in self._known:
            if known == settings:
                return number
        self._count += 1
        self._known.append((settings, self._count))
        return self._count

    @property
    def plain(self) -> bool:
        """Whether the model is exactly what its class builds from its config.

        Its modules and tensors have the types and shapes that the class gives them, and there are
        no hooks, adapters, parametrizations or replaced methods. Only then is a pass of ours for
        that class known to compute what the model's own forward does. A quantized copy (see
        :mod:`rapid_llm.engine.quantized`) is plain if its original is.
        """
        return self._last.plain

    @property
    def copyable(self) -> bool:
        """Whether a copy of the model computes the same, as no code is bound to this object."""
        return self._last.copyable

    @property
    def traceable(self) -> bool:
        """Whether results depend only on state that is tracked.

        They may depend on more where hooks, replaced methods or classes of modules come from code
        outside of installed packages.
        """
        return self._last.traceable

    @property
    def portable(self) -> bool:
        """Whether tensors and attributes determine the results in another process too.

        Where the model is divided among processes, in all of them together.
        """
        return self._last.portable

    @property
    def settings(self) -> list[tuple[str, str, Any]]:
        """Plain data in modules and configs, as (module, attribute, value)."""
        return self._last.settings

    @property
    def configs(self) -> list[PretrainedConfig]:
        """All configs that modules refer to; a copied module has its own."""
        return self._last.configs

    @property
    def contents(self) -> tuple[Any, ...]:
        """Value that is equal for equal states, valid while the tensors live."""
        tensors = list(zip(map(id, self._last.tensors), self._last.places, strict=True))
        return tensors, self._samples, self.settings
