"""Validate that documents and questions are text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from rapid_llm.errors import DocumentError
from rapid_llm.surrogates import without_surrogates


def require_documents(documents: str | Iterable[str]) -> tuple[str, ...]:
    """Validate one document or several, and return a tuple; lone surrogates become U+FFFD.

    Raises:
        DocumentError: the value is not a list of texts, one is not text (see
            :func:`require_text` and :func:`require_read`), or all are blank.
    """
    if isinstance(documents, str):
        documents = (documents,)
    if not isinstance(documents, Iterable) or isinstance(documents, Mapping | Set | bytes):
        raise DocumentError(
            f"documents of type {type(documents).__name__} are not allowed: give one text, or a "
            "list of texts in the order in which they are to be read"
        )
    texts = tuple(documents)
    if not texts:
        raise DocumentError("no document was given: give at least one text")
    read = [
        (i, text) for i, text in enumerate(texts, 1) if not isinstance(text, str) or text.strip()
    ]
    if not read:
        name = "the document is" if len(texts) == 1 else f"all {len(texts)} documents are"
        raise DocumentError(f"{name} empty: give a text that is more than white space")
    for number, text in read:
        name = f"document {number} of {len(texts)}" if len(texts) > 1 else "the document"
        require_text(name, text)
        require_read(name, text)
    return tuple(map(without_surrogates, texts))


def require_read(name: str, text: str) -> None:
    """Refuse the bytes of a PDF, which a loader that does not read PDF gives for its text.

    Raises:
        DocumentError: the text is the bytes of a PDF.
    """
    if text.startswith("%PDF-"):
        raise DocumentError(
            f"{name} holds the bytes of a PDF and not its text: read the file with "
            "rapid_llm.read_document, or install what its loader needs for PDF (LlamaIndex's "
            "SimpleDirectoryReader: llama-index-readers-file)"
        )


def require_text(name: str, text: object) -> str:
    """Validate a text and return it with U+FFFD for lone surrogates.

    Args:
        name: name of the text in errors, such as "the question".
        text: value that must be a string with more than white space.

    Raises:
        DocumentError: the value is not a string, or is blank.
    """
    if not isinstance(text, str):
        raise DocumentError(
            f"{name} is {type(text).__name__}, not text: give a str (read_document reads files)"
        )
    if not text.strip():
        raise DocumentError(f"{name} is empty: give a text that is more than white space")
    return without_surrogates(text)
