"""RAPID: long-context answers by retrieval-augmented speculative decoding (arXiv 2502.20330).

Most names are imported at first use, so that importing the package does not import torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from rapid_llm.config import EngineConfig, RetrievalConfig, SamplingParams, SpeculationConfig
from rapid_llm.errors import (
    ContextWindowError,
    DataError,
    DocumentError,
    ForkedProcessError,
    GenerationTimeoutError,
    InvalidParameterError,
    JudgeError,
    MissingDependencyError,
    ModelError,
    NumericalError,
    RankError,
    RapidError,
    ServerError,
    TokenizerMismatchError,
)
from rapid_llm.old_names import MovedModules
from rapid_llm.stats import Stats

if TYPE_CHECKING:
    from rapid_llm.answers import Answer
    from rapid_llm.context import ContextBuilder, RetrievalContext, read_document
    from rapid_llm.context.prompts import build_messages
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.interface import GenerationRequest
    from rapid_llm.models import LoadedModel, load_model
    from rapid_llm.pipeline import Conversation, RapidPipeline
    from rapid_llm.remote import RemoteDecoder
    from rapid_llm.results import Delta, GenerationResult

try:
    __version__ = version("rapid-llm")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

sys.meta_path.append(MovedModules())

_LAZY = {
    "Answer": "rapid_llm.answers",
    "Delta": "rapid_llm.results",
    "ContextBuilder": "rapid_llm.context",
    "Conversation": "rapid_llm.pipeline",
    "GenerationRequest": "rapid_llm.interface",
    "GenerationResult": "rapid_llm.results",
    "LoadedModel": "rapid_llm.models",
    "RapidDecoder": "rapid_llm.decoder",
    "RapidPipeline": "rapid_llm.pipeline",
    "RemoteDecoder": "rapid_llm.remote",
    "RetrievalContext": "rapid_llm.context",
    "build_messages": "rapid_llm.context.prompts",
    "load_model": "rapid_llm.models",
    "read_document": "rapid_llm.context",
}

_RENAMED = {"Chunk": "Delta", "Inquiry": "RapidPipeline"}

__all__ = [
    "Answer",
    "ContextBuilder",
    "ContextWindowError",
    "Conversation",
    "DataError",
    "Delta",
    "DocumentError",
    "EngineConfig",
    "ForkedProcessError",
    "GenerationRequest",
    "GenerationResult",
    "GenerationTimeoutError",
    "InvalidParameterError",
    "JudgeError",
    "LoadedModel",
    "MissingDependencyError",
    "ModelError",
    "NumericalError",
    "RankError",
    "RapidDecoder",
    "RapidError",
    "RapidPipeline",
    "RemoteDecoder",
    "RetrievalConfig",
    "RetrievalContext",
    "SamplingParams",
    "ServerError",
    "SpeculationConfig",
    "Stats",
    "TokenizerMismatchError",
    "__version__",
    "build_messages",
    "load_model",
    "read_document",
]


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        # Not an AttributeError, whose text ``from rapid_llm import …`` does not show.
        raise ImportError(f"rapid_llm.{name} is now rapid_llm.{_RENAMED[name]}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
