"""From a prompt (text, chat messages or token ids) to token ids. Message content is data."""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from secrets import token_hex
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jinja2 import TemplateError
from tokenizers import AddedToken, Encoding, Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from rapid_llm.errors import InvalidParameterError

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[Message] | Sequence[int] | torch.Tensor


def encode_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt.

    Args:
        prompt: one of three forms. Text gets the tokenizer's own special tokens (never a second
            BOS), and special tokens in it are parsed: the caller wrote it. Chat messages go through
            the model's chat template, with the opening of the answer added; control tokens inside
            a message's content are ordinary text. Token ids (a sequence, or an integer tensor
            [n] or [1, n]) are checked and returned.
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
        return _encode_messages(prompt, tokenizer, chat_template_kwargs or {})
    return _checked_ids(prompt, tokenizer)


def drop_oldest_turns(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    max_new_tokens: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Message]:
    """Chat messages that fit into a context window: as many of the latest turns as there is room.

    A turn begins with a message of the user. System messages and the last turn always stay, even
    where they alone are too long.

    Args:
        messages: the chat, the latest message last.
        tokenizer: the model's tokenizer.
        window: tokens that the model can hold.
        max_new_tokens: tokens kept free for the answer, a quarter of the window at most.
        chat_template_kwargs: variables of the chat template.

    Raises:
        InvalidParameterError: as :func:`encode_prompt`.
    """
    system = [m.get("role") in ("system", "developer") for m in messages]
    users = (i for i, m in enumerate(messages) if m.get("role") == "user")
    # Where the history may begin: at its start, or at a turn that has something before it.
    starts = [0, *(i for i in users if not all(system[:i]))]
    room = window - min(max_new_tokens, window // 4)

    def kept(start: int) -> list[Message]:
        return [m for i, m in enumerate(messages) if i >= start or system[i]]

    def fits(start: int) -> bool:
        return len(encode_prompt(kept(start), tokenizer, chat_template_kwargs)) <= room

    # The later it begins the shorter it is: the earliest start that fits is found by halves.
    return kept(starts[bisect_left(starts[:-1], True, key=fits)])


def encode_literal(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of ``text`` as ordinary text: no BOS, and no control token whatever it holds."""
    return literal_encoding(text, tokenizer).ids


def literal_encoding(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoding:
    """``encode_literal`` with each token's character range in ``text`` (``.ids``, ``.offsets``)."""
    if _control_pattern(_control_tokens(tokenizer)).search(text):
        return _literal_twin(tokenizer).encode(text)
    return tokenizer(text, add_special_tokens=False, verbose=False).encodings[0]


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
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
    # Ids of added tokens may leave gaps, so the number of tokens is not always the limit.
    limit = max([len(tokenizer), *(i + 1 for i in tokenizer.added_tokens_decoder)])
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool):
            raise InvalidParameterError(
                f"prompt element {i!r} is not allowed: a prompt is text, a list of chat messages "
                "(dicts with role and content), or a list of token ids"
            )
        if not 0 <= i < limit:
            raise InvalidParameterError(
                f"token id {i} is outside the vocabulary of {limit} tokens: encode the prompt "
                "with this model's own tokenizer"
            )
    return list(ids)


# --- chat messages -----------------------------------------------------------------------------


def _encode_messages(
    messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]
) -> list[int]:
    if not tokenizer.chat_template:
        raise InvalidParameterError(
            "the tokenizer has no chat template, so messages cannot be encoded: pass the prompt "
            "as text, or set tokenizer.chat_template"
        )
    chat = [_checked_message(message) for message in messages]
    pattern = _control_pattern(_control_tokens(tokenizer))
    if any(pattern.search(message["content"]) for message in chat):
        return _literal_twin(tokenizer).encode_chat(chat, tokenizer, variables)
    text = _render(chat, tokenizer, variables)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise InvalidParameterError("the messages have no tokens: pass at least one with content")
    return ids


def _checked_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidParameterError(
            f"message {message!r} is not allowed: each message is a dict with a role (text) and "
            "a content"
        )
    return {**message, "content": _content_text(message.get("content"))}


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidParameterError(
            f"message content of type {type(content).__name__} is not allowed: content is text or "
            "a list of text parts"
        )
    return "\n".join(_part_text(part) for part in content)


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InvalidParameterError(
            f"a message part of type {kind!r} is not allowed: this is a text model, send parts of "
            'the form {"type": "text", "text": ...}'
        )
    return part["text"]


def _render(
    chat: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]
) -> str:
    try:
        return tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False, **variables
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in chat)
        raise InvalidParameterError(
            f"the model's chat template refuses messages with the roles {roles} ({error}): send "
            "the roles and the order that it expects"
        ) from error


# --- control tokens as ordinary text -----------------------------------------------------------


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[AddedToken, ...]:
    """The tokens that steer the model: special ones, and those that the chat template writes.

    Some models mark the delimiters of their template as ordinary added tokens.
    """
    template = str(tokenizer.chat_template or "")
    tokens = {
        token.content: token
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content.strip() and token.content in template)
    }
    for content in tokenizer.all_special_tokens:
        tokens.setdefault(content, AddedToken(content, normalized=False, special=True))
    return tuple(tokens.values())


def _control_pattern(tokens: Sequence[AddedToken]) -> re.Pattern[str]:
    longest_first = sorted((token.content for token in tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


class _LiteralTwin:
    """A copy of a tokenizer to which control tokens are ordinary text.

    The whole text is encoded in one pass, so nothing but the control tokens changes: encoding it
    in pieces would break merges at their borders and, in SentencePiece-like tokenizers, add a space
    to each. The control tokens that the template itself writes pass under secret names.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise InvalidParameterError(
                f"the text holds control tokens of {type(tokenizer).__name__}, which cannot read "
                "them as ordinary text: use the model's fast tokenizer, or remove them"
            )
        self.tokens = _control_tokens(tokenizer)
        self._pattern = _control_pattern(self.tokens)
        self._mark = token_hex(16)  # drawn here, so that no document can hold a secret name
        contents = [token.content for token in self.tokens]
        self._names = {text: f"{self._mark}n{i}x" for i, text in enumerate(contents)}
        self._quotes = {text: f"{self._mark}q{i}x" for i, text in enumerate(contents)}

        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens(contents)
        backend.encode_special_tokens = True
        backend.add_tokens(
            [
                AddedToken(
                    self._names[token.content],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                )
                for token in self.tokens
            ]
        )
        # The model's own vocabulary may hold a control token too (Unigram, WordPiece): no piece
        # that reaches it may contain one whole.
        inner = "|".join(f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in contents if len(t) > 1)
        steps = [backend.pre_tokenizer, pre_tokenizers.Split(Regex(inner), "isolated")]
        backend.pre_tokenizer = pre_tokenizers.Sequence([step for step in steps if step])
        self._backend = backend
        self._control_ids = {
            backend.token_to_id(name): tokenizer.convert_tokens_to_ids(text)
            for text, name in self._names.items()
        }

    def encode(self, text: str) -> Encoding:
        """``text`` without control tokens."""
        return self._backend.encode(text, add_special_tokens=False)

    def encode_chat(
        self,
        chat: list[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        variables: Mapping[str, Any],
    ) -> list[int]:
        """The templated chat, with the template's control tokens and none from a content."""
        quoted = [
            {**m, "content": self._pattern.sub(lambda t: self._quotes[t[0]], m["content"])}
            for m in chat
        ]
        text = self._pattern.sub(lambda t: self._names[t[0]], _render(quoted, tokenizer, variables))
        text = re.sub(rf"{self._mark}q(\d+)x", lambda t: self.tokens[int(t[1])].content, text)
        return [self._control_ids.get(i, i) for i in self.encode(text).ids]


_twins: WeakKeyDictionary[PreTrainedTokenizerBase, _LiteralTwin] = WeakKeyDictionary()


def _literal_twin(tokenizer: PreTrainedTokenizerBase) -> _LiteralTwin:
    twin = _twins.get(tokenizer)
    if twin is None or twin.tokens != _control_tokens(tokenizer):
        twin = _twins[tokenizer] = _LiteralTwin(tokenizer)
    return twin
