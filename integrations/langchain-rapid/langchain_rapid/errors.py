"""Errors of the package: the retriever's, and the decoder's for a timeout."""

from rapid_llm.errors import GenerationTimeoutError, RapidError

__all__ = ["GenerationTimeoutError", "RetrievalError"]


class RetrievalError(RapidError):
    """The retriever failed; ``__cause__`` is its own error."""
