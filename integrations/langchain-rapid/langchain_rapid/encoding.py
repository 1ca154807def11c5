"""Encode texts and chat messages as prompts of the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from rapid_llm.encoding import Message, Prompt
    from transformers import PreTrainedTokenizerBase

Written: TypeAlias = "str | Sequence[Message]"
"""A prompt before it is encoded: a text or chat messages."""


class Encoder(NamedTuple):
    """Encodes prompts for one model.

    Attributes:
        tokenizer: the model's tokenizer.
        variables: variables of its chat template.
        formatted: whether a text is a finished prompt, whose control tokens steer the model;
            otherwise they are ordinary text.
    """

    tokenizer: PreTrainedTokenizerBase
    variables: Mapping[str, Any]
    formatted: bool = False

    def __call__(self, prompt: Written) -> Prompt:
        """Encode a prompt; an empty text is left to the decoder, which refuses it.

        Raises:
            InvalidParameterError: the messages do not fit the chat template.
        """
        if not isinstance(prompt, str):
            return self.chat(prompt)
        return prompt if self.formatted or not prompt else self._literal(prompt)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of chat messages, including the opening of the answer."""
        from rapid_llm.encoding import encode_prompt

        return encode_prompt(messages, self.tokenizer, self.variables)

    def _literal(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds, such as BOS."""
        from rapid_llm.encoding import encode_literal

        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        framed = self.tokenizer("a")["input_ids"]
        at = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
        return [*framed[:at], *encode_literal(text, self.tokenizer), *framed[at + len(bare) :]]
