"""Errors that only a LangChain pipeline can meet."""

from rapid_llm.errors import RapidError


class GenerationTimeoutError(RapidError, TimeoutError):
    """``timeout`` seconds passed before the answer was finished."""


class RetrievalError(RapidError):
    """The retriever failed; its own error is the cause."""
