"""From LlamaIndex's messages and texts to the decoder's prompts."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole, TextBlock, ThinkingBlock
from transformers import PreTrainedTokenizerBase

from rapid_llm.encoding import Prompt, encode_literal
from rapid_llm.surrogates import without_surrogates

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.FUNCTION: "tool",
    MessageRole.MODEL: "assistant",
}
"""Other providers' roles, by the names that chat templates know."""


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


def literal(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A prompt for a model without a chat template; control tokens in it are ordinary text."""
    text = without_surrogates(text)
    ids = encode_literal(text, tokenizer)
    if ids == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]:
        return text
    probe = tokenizer("a", return_special_tokens_mask=True)
    own = [i for i, special in enumerate(probe["special_tokens_mask"]) if not special]
    around = probe["input_ids"]
    return [*around[: own[0]], *ids, *around[own[-1] + 1 :]]
