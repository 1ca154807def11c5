"""Read, chunk, embed, store and retrieve documents: the drafter's context."""

from rapid_llm.config import PACKAGED_EMBEDDER
from rapid_llm.context.builder import Chunk, ContextBuilder, RetrievalContext
from rapid_llm.context.chunking import Span, count_tokens, split_text
from rapid_llm.context.documents import read_document
from rapid_llm.context.embedder_loading import DEFAULT_EMBEDDER, load_embedder
from rapid_llm.context.embedding import Embedder

__all__ = [
    "DEFAULT_EMBEDDER",
    "PACKAGED_EMBEDDER",
    "Chunk",
    "ContextBuilder",
    "Embedder",
    "RetrievalContext",
    "Span",
    "count_tokens",
    "load_embedder",
    "read_document",
    "split_text",
]
