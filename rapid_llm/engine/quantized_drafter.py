"""The model that drafts: a drafter, or its quantized copy, whose steps are faster."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rapid_llm.config import EngineConfig, Quantization
from rapid_llm.engine.device import WeightKind, device_of
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.quantized import quantized_nbytes
from rapid_llm.errors import InvalidParameterError
from rapid_llm.options import require


class QuantizedDrafter:
    """A drafter and its quantized copy, which is made at the first draft.

    Args:
        drafter: runner of the drafter.
        quantization: requested weight format of the copy.
        auto: whether ``auto`` takes the fastest format, rather than none.
        discard: function called with the runner of a copy that is out of date.

    Raises:
        InvalidParameterError: the quantization is unknown, or not supported for this model.
    """

    def __init__(
        self,
        drafter: ModelRunner,
        quantization: Quantization | None,
        *,
        auto: bool,
        discard: Callable[[ModelRunner], None],
    ) -> None:
        self._drafter = drafter
        self._kind = _weight_kind(drafter, quantization, auto=auto)
        self._discard = discard
        self._copy: ModelRunner | None = None

    @property
    def runner(self) -> ModelRunner:
        """Runner of the copy, or of the drafter where no copy is wanted or would be exact.

        The copy is made at the first use, and again when weights or adapters have changed. Models
        with hooks or replaced methods are not copied.
        """
        drafter = self._drafter
        if self._kind is None or not drafter.copyable:
            return drafter
        quantizer = device_of(drafter.device).quantizers[self._kind]
        model = quantizer.copy(drafter.model, drafter.state, drafter.passes)
        if self._copy is None or self._copy.model is not model:
            if self._copy is not None:
                self._discard(self._copy)
            self._copy = ModelRunner(
                model,
                f"{drafter.name} ({self._kind})",
                drafter.attn_implementation,
                drafter.cuda_graphs,
            )
            self._copy.ranks = drafter.ranks
        return self._copy

    @property
    def nbytes(self) -> int:
        """Bytes of the copy's own weights; 0 before it is made."""
        return 0 if self._copy is None else quantized_nbytes(self._copy.model)


def _weight_kind(
    drafter: ModelRunner, quantization: Quantization | None, *, auto: bool
) -> WeightKind | None:
    """Weight format for drafting; None for the model's own weights."""
    require(EngineConfig, drafter_quantization=quantization)
    if quantization == "auto":
        return fastest_weights(drafter) if auto else None
    if quantization is not None:
        require_quantizable(drafter, quantization)
    return quantization


def fastest_weights(runner: ModelRunner) -> WeightKind | None:
    """Weight format with the fastest draft step; None for the model's own weights."""
    quantizers, passes = device_of(runner.device).quantizers, runner.passes
    return next((k for k, each in quantizers.items() if each.pays(runner.model, passes)), None)


def require_quantizable(runner: ModelRunner, kind: WeightKind) -> None:
    """Check that a model can be quantized.

    Args:
        runner: runner of the model.
        kind: weight format.

    Raises:
        InvalidParameterError: the model or its device does not support the format.
    """
    require_format(kind, runner.device, runner.name)
    device_of(runner.device).quantizers[kind].require(runner.model, runner.name, runner.passes)


def require_format(kind: WeightKind, device: torch.device, name: str) -> None:
    """Check that a device has a weight format.

    Args:
        kind: weight format.
        device: the device.
        name: name of the model in errors.

    Raises:
        InvalidParameterError: the device does not support the format.
    """
    quantizers = device_of(device).quantizers
    if kind not in quantizers:
        others = " or ".join(map(repr, sorted(quantizers)))
        raise InvalidParameterError(
            f"drafter_quantization={kind!r} does not serve on {device}, where {name} "
            f"is: take {others or 'None'}, or load a drafter quantized for that device "
            "(bitsandbytes or torchao, through transformers' quantization_config), pass it as "
            "drafter= and leave drafter_quantization out"
        )
