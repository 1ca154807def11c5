"""LlamaIndex's messages as the chat template takes them, and prompts for models without one."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock, ThinkingBlock

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}
"""Roles of other providers, by the name that chat templates know."""


def as_dict(message: ChatMessage) -> dict[str, Any]:
    """A message for the chat template; parts that are no text are refused there."""
    role = _ROLES.get(message.role, message.role.value)
    if all(isinstance(block, TextBlock) for block in message.blocks):
        return {"role": role, "content": message.content or ""}
    return {"role": role, "content": [_part(block) for block in message.blocks]}


def _part(block: Any) -> dict[str, Any]:
    if isinstance(block, TextBlock):
        return {"type": "text", "text": block.text}
    if isinstance(block, ThinkingBlock):
        return {"type": "thinking", "thinking": block.content or ""}
    return {"type": block.block_type}
