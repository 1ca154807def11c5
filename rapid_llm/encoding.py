"""Encode a prompt (text, chat messages or token ids) as token ids.

The content of messages is data: control tokens in it are encoded as ordinary text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from rapid_llm.chat import SYSTEM_ROLES, Message, encode_chat
from rapid_llm.errors import InvalidParameterError
from rapid_llm.literal import encode_literal, literal_encoding
from rapid_llm.options import whole
from rapid_llm.surrogates import without_surrogates

__all__ = [
    "Message",
    "Prompt",
    "drop_oldest_turns",
    "encode_literal",
    "encode_prompt",
    "literal_encoding",
]

Prompt: TypeAlias = str | Sequence[Message] | Sequence[int] | torch.Tensor


def encode_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Encode a prompt as token ids.

    Args:
        prompt: text, chat messages or token ids. Text gets the tokenizer's special tokens (never a
            second BOS), and special tokens written in it are parsed. Chat messages go through the
            model's chat template, with the opening of the answer added; control tokens in their
            content are ordinary text. Token ids, a sequence or an integer tensor ``[n]`` or
            ``[1, n]``, are checked and returned.
        tokenizer: the model's tokenizer.
        chat_template_kwargs: variables of the chat template (``enable_thinking``, …).

    Raises:
        InvalidParameterError: the prompt is empty or of another type, an id is outside the
            vocabulary, or the messages do not fit the chat template (or there is none).
    """
    if isinstance(prompt, torch.Tensor):
        prompt = _tensor_ids(prompt)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise InvalidParameterError(
            f"a prompt of type {type(prompt).__name__} is not allowed: pass text, a list of chat "
            "messages, or a list of token ids"
        )
    if len(prompt) == 0:
        raise InvalidParameterError("the prompt is empty: pass at least one character or token")
    if isinstance(prompt, str):
        return _encode_text(prompt, tokenizer)
    if isinstance(prompt[0], Mapping):
        return encode_chat(prompt, tokenizer, chat_template_kwargs)
    return _checked_ids(prompt, tokenizer)


def drop_oldest_turns(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    max_new_tokens: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Message]:
    """Drop the oldest turns of a chat until it fits a context window.

    A turn begins with a user message. System messages and the last turn always stay, even where
    they alone are too long.

    Args:
        messages: chat messages, the latest last.
        tokenizer: the model's tokenizer.
        window: the model's context window in tokens.
        max_new_tokens: number of tokens kept free for the answer, at most a quarter of the window.
        chat_template_kwargs: variables of the chat template.

    Raises:
        InvalidParameterError: see :func:`encode_prompt`.
    """
    system = [m.get("role") in SYSTEM_ROLES for m in messages]
    users = (i for i, m in enumerate(messages) if m.get("role") == "user")
    # Possible first messages of the history: its start, or any later turn.
    starts = [0, *(i for i in users if not all(system[:i]))]
    room = window - min(max_new_tokens, window // 4)

    def kept(start: int) -> list[Message]:
        return [m for i, m in enumerate(messages) if i >= start or system[i]]

    def fits(start: int) -> bool:
        return len(encode_prompt(kept(start), tokenizer, chat_template_kwargs)) <= room

    # The later the history begins the shorter it is: bisection finds the earliest start that fits.
    return kept(starts[bisect_left(starts[:-1], True, key=fits)])


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    text = without_surrogates(text)
    ids = tokenizer(text, add_special_tokens=not has_bos, verbose=False)["input_ids"]
    if not ids:
        raise InvalidParameterError(f"the prompt {text!r} has no tokens: pass some text")
    return ids


def _tensor_ids(prompt: torch.Tensor) -> list[int]:
    if prompt.ndim == 2 and prompt.shape[0] == 1:
        prompt = prompt[0]
    if prompt.ndim != 1 or prompt.is_floating_point():
        raise InvalidParameterError(
            f"a prompt tensor of shape {list(prompt.shape)} and dtype {prompt.dtype} is not "
            "allowed: pass whole numbers of shape [n] or [1, n]"
        )
    return prompt.tolist()


def _checked_ids(ids: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # Ids of added tokens may leave gaps, so the limit can exceed the number of tokens.
    limit = max([len(tokenizer), *(i + 1 for i in tokenizer.added_tokens_decoder)])
    checked = []
    for given in ids:
        i = whole(given)
        if i is None:
            raise InvalidParameterError(
                f"prompt element {given!r} is not allowed: a prompt is text, a list of chat "
                "messages (dicts with role and content), or a list of token ids"
            )
        if not 0 <= i < limit:
            raise InvalidParameterError(
                f"token id {i} is outside the vocabulary of {limit} tokens: encode the prompt "
                "with this model's own tokenizer"
            )
        checked.append(i)
    return checked
