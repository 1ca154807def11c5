"""What counts as text: of documents and of questions."""

from __future__ import annotations

from rapid_llm.errors import DocumentError


def require_text(name: str, text: object) -> None:
    """Refuse what holds nothing to read.

    Args:
        name: what the error calls it, such as "the question".
        text: has to be a string with more than white space in it.

    Raises:
        DocumentError: it is no string, is empty, or holds half of a surrogate pair.
    """
    if not isinstance(text, str):
        raise DocumentError(f"{name} is {type(text).__name__}, not text: decode it to a str")
    if not text.strip():
        raise DocumentError(f"{name} is empty: give a text that is more than white space")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DocumentError(
            f"{name} holds a lone surrogate at character {error.start}, which is no text: "
            "decode it with errors='replace'"
        ) from error
