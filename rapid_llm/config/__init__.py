"""All options: sampling, speculation, models and engine, retrieval.

Each is declared once, here; the command line, both wheels and the server derive theirs.
"""

from rapid_llm.config.engine import (
    PACKAGED_MODEL,
    Attention,
    EngineConfig,
    Quantization,
    RemoteConfig,
)
from rapid_llm.config.retrieval import (
    MIN_RETRIEVAL_TOKENS,
    PACKAGED_EMBEDDER,
    OnEmpty,
    Order,
    RetrievalConfig,
    Retriever,
    Truncate,
)
from rapid_llm.config.sampling import MIN_TEMPERATURE, SamplingParams
from rapid_llm.config.speculation import MAX_ETA, Drafting, Mode, SpeculationConfig

__all__ = [
    "MAX_ETA",
    "MIN_RETRIEVAL_TOKENS",
    "MIN_TEMPERATURE",
    "PACKAGED_EMBEDDER",
    "PACKAGED_MODEL",
    "Attention",
    "Drafting",
    "EngineConfig",
    "Mode",
    "OnEmpty",
    "Order",
    "Quantization",
    "RemoteConfig",
    "RetrievalConfig",
    "Retriever",
    "SamplingParams",
    "SpeculationConfig",
    "Truncate",
]
