"""Messages of a model, whole and joined from a stream."""

from __future__ import annotations

from langchain_core.messages import AIMessage, AIMessageChunk


def answer(message: AIMessage) -> str:
    assert isinstance(message.content, str)
    return message.content


def joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole
