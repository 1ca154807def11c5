"""RAPID: long-context answers, drafted by a model that reads only what was retrieved.

The names are imported at first use, so that importing the package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.errors import (
    ContextWindowError,
    DataError,
    DocumentError,
    InvalidParameterError,
    JudgeError,
    MissingDependencyError,
    ModelError,
    NumericalError,
    RapidError,
    TokenizerMismatchError,
)
from rapid_llm.stats import Stats

if TYPE_CHECKING:
    from rapid_llm.context import ContextBuilder, RetrievalContext
    from rapid_llm.decoder import GenerationResult, RapidDecoder
    from rapid_llm.pipeline import Inquiry

try:
    __version__ = version("rapid-llm")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "ContextBuilder",
    "ContextWindowError",
    "DataError",
    "DocumentError",
    "GenerationResult",
    "Inquiry",
    "InvalidParameterError",
    "JudgeError",
    "MissingDependencyError",
    "ModelError",
    "NumericalError",
    "RapidDecoder",
    "RapidError",
    "RetrievalContext",
    "SamplingParams",
    "SpeculationConfig",
    "Stats",
    "TokenizerMismatchError",
    "__version__",
]

_LAZY = {
    "ContextBuilder": "rapid_llm.context",
    "GenerationResult": "rapid_llm.decoder",
    "Inquiry": "rapid_llm.pipeline",
    "RapidDecoder": "rapid_llm.decoder",
    "RetrievalContext": "rapid_llm.context",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
