"""Positions of documents in a prompt, carried through LangChain's run configs."""

from __future__ import annotations

from typing import TypedDict


class Place(TypedDict):
    """Position of a document in a prompt, in plain values that LangChain's runs can carry.

    Attributes:
        message: index of the message; 0 in a text.
        start, end: character range of the document in the message.
        passages: passages retrieved from it: character ranges of the document, or texts that are
            not found there.
    """

    message: int
    start: int
    end: int
    passages: list[tuple[int, int] | str]
