"""What counts as text: of documents and of questions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from rapid_llm.errors import DocumentError


def require_documents(documents: str | Iterable[str]) -> tuple[str, ...]:
    """One document or several, as several.

    Raises:
        DocumentError: they are no sequence, one is no text (see :func:`require_text`), or there is
            nothing to read in any of them.
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
        require_text(
            f"document {number} of {len(texts)}" if len(texts) > 1 else "the document", text
        )
    return texts


def require_text(name: str, text: object) -> None:
    """Refuse what holds nothing to read.

    Args:
        name: what the error calls it, such as "the question".
        text: has to be a string with more than white space in it.

    Raises:
        DocumentError: it is no string, is empty, or holds half of a surrogate pair.
    """
    if not isinstance(text, str):
        raise DocumentError(
            f"{name} is {type(text).__name__}, not text: give a str (read_document reads files)"
        )
    if not text.strip():
        raise DocumentError(f"{name} is empty: give a text that is more than white space")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DocumentError(
            f"{name} holds a lone surrogate at character {error.start}, which is no text: "
            "decode it with errors='replace'"
        ) from error
