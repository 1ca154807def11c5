"""Errors that only a LangChain pipeline can meet, and the decoder's for a timeout."""

from rapid_llm.errors import GenerationTimeoutError, RapidError

__all__ = ["GenerationTimeoutError", "RetrievalError"]


class RetrievalError(RapidError):
    """The retriever failed; its own error is the cause."""
