"""Positions of documents in a prompt, carried through LangChain's run configs."""

from __future__ import annotations

from typing import TypedDict


class Place(TypedDict):
    """Where a document stands in a prompt. Plain values, as it passes through LangChain's runs.

    Attributes:
        message: index of the message; 0 in a text.
        start, end: the document's characters in it.
        passages: what was retrieved from it: characters of the document, or a text that is not
            found there.
    """

    message: int
    start: int
    end: int
    passages: list[tuple[int, int] | str]
