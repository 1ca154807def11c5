"""Convert LlamaIndex's messages and texts to prompts of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.generic_utils import (
    messages_to_prompt as default_messages_to_prompt,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms.llm import default_completion_to_prompt

from rapid_llm.surrogates import without_surrogates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rapid_llm.encoding import Prompt

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.FUNCTION: "tool",
    MessageRole.MODEL: "assistant",
}
"""Roles of chat templates by other providers' names."""


class PromptWriter:
    """Writes the prompts of one model.

    Args:
        tokenizer: the model's tokenizer.
        messages_to_prompt: the user's function from messages to a finished prompt; None and
            LlamaIndex's default mean the model's chat template.
        completion_to_prompt: the user's function from a text to a finished prompt, likewise.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages_to_prompt: Callable[[Sequence[ChatMessage]], str] | None = None,
        completion_to_prompt: Callable[[str], str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._of_messages = _own(messages_to_prompt, default_messages_to_prompt)
        self._of_text = _own(completion_to_prompt, default_completion_to_prompt)

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self._tokenizer.chat_template)

    @property
    def uses_template(self) -> bool:
        """Whether chats go through the model's chat template."""
        return self.has_template and self._of_messages is None

    @property
    def shows_tools(self) -> bool:
        """Whether the model can be shown tools, and its calls can be parsed."""
        if not self.uses_template:
            return False
        from rapid_llm.chat import template_of
        from rapid_llm.tool_formats import format_of

        return format_of(template_of(self._tokenizer, {"tools": [{}]})) is not None

    def template_tokens(self, variables: Mapping[str, Any]) -> int:
        """Number of tokens that the chat template adds to a user message and a system message.

        Args:
            variables: variables of the template.
        """
        if not self.has_template:
            return 0
        from rapid_llm.encoding import encode_literal, encode_prompt

        tokenizer = self._tokenizer
        system, user = ({"role": role, "content": "a"} for role in ("system", "user"))
        content = len(encode_literal("a", tokenizer))
        return max(
            len(encode_prompt(chat, tokenizer, variables)) - content * len(chat)
            for chat in ([user], [system, user])
        )

    def from_text(self, text: str, formatted: bool = False) -> Prompt:
        """The prompt of a completion; control tokens of a formatted one steer the model."""
        if formatted:
            return text
        if self._of_text is not None:
            return self._of_text(text)
        if self.has_template:
            return [{"role": "user", "content": text}]
        return literal(text, self._tokenizer)

    def from_engine(self, text: str) -> Prompt:
        """The prompt of an engine's text; only the user's functions write control tokens in it."""
        if self._of_text is None and self._of_messages is None:
            return literal(text, self._tokenizer)
        return str(text)

    def from_messages(self, messages: Sequence[ChatMessage]) -> Prompt:
        """The prompt of a chat."""
        if self._of_messages is not None:
            return self._of_messages(messages)
        if self.has_template:
            return [as_dict(message) for message in messages]
        return literal(default_messages_to_prompt(messages), self._tokenizer)


def _own(function: Callable[..., str] | None, default: object) -> Callable[..., str] | None:
    """The user's function; LlamaIndex fills in its default where there is none."""
    return None if function is default else function


def as_dict(message: ChatMessage) -> dict[str, Any]:
    """Convert a message to OpenAI's form; the chat template refuses parts other than text.

    Tool calls are those of its blocks, or else those of ``additional_kwargs`` in older messages.
    """
    role = _ROLES.get(message.role, message.role.value)
    shown: dict[str, Any] = {"role": role}
    parts = [block for block in message.blocks if not isinstance(block, ToolCallBlock)]
    if all(isinstance(block, TextBlock) for block in parts):
        shown["content"] = message.content or ""
    else:
        shown["content"] = [_part(block) for block in parts]
    if role == "assistant" and (calls := _calls(message)):
        shown["tool_calls"] = calls
    if role == "tool" and message.additional_kwargs.get("tool_call_id") is not None:
        shown["tool_call_id"] = message.additional_kwargs["tool_call_id"]
    return shown


def _part(block: Any) -> dict[str, Any]:
    if isinstance(block, TextBlock):
        return {"type": "text", "text": block.text}
    if isinstance(block, ThinkingBlock):
        return {"type": "thinking", "thinking": block.content or ""}
    return {"type": block.block_type}


def _calls(message: ChatMessage) -> list[dict[str, Any]]:
    blocks = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    if not blocks:
        beside = message.additional_kwargs.get("tool_calls") or ()
        return [dict(c if isinstance(c, Mapping) else c.model_dump()) for c in beside]
    return [
        {
            "id": block.tool_call_id,
            "type": "function",
            "function": {"name": block.tool_name, "arguments": block.tool_kwargs},
        }
        for block in blocks
    ]


def literal(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A prompt for a model without a chat template; control tokens in it are ordinary text."""
    from rapid_llm.encoding import encode_literal

    text = without_surrogates(text)
    ids = encode_literal(text, tokenizer)
    if ids == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]:
        return text
    probe = tokenizer("a", return_special_tokens_mask=True)
    own = [i for i, special in enumerate(probe["special_tokens_mask"]) if not special]
    around = probe["input_ids"]
    return [*around[: own[0]], *ids, *around[own[-1] + 1 :]]
