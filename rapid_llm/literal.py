"""Encode control tokens inside a text as ordinary text, so that data never steers the model."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import cached_property
from secrets import token_hex
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Encoding, Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from rapid_llm.errors import InvalidParameterError
from rapid_llm.surrogates import without_surrogates

_ROLES = frozenset({"system", "developer", "user", "assistant", "model", "tool", "function"})

_BLOCK = re.compile(r"\{#.*?#\}|\{[{%].*?[%}]\}", re.DOTALL)
_STRING = re.compile(
    r"""(?P<sought>(?:\.|\|\s*)(?:count|endswith|find|index|partition|removeprefix|removesuffix
        |replace|rfind|rindex|rpartition|rsplit|split|startswith)\(\s*)?
        (?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
        (?P<within>\s+(?:not\s+)?in\b)?""",
    re.VERBOSE | re.DOTALL,
)
"""A string literal in a block of a Jinja template, with the test or method that searches for it."""


def encode_literal(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text without BOS, with control tokens in it encoded as ordinary text."""
    return literal_encoding(text, tokenizer).ids


def literal_encoding(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoding:
    """:func:`encode_literal` with character offsets of the tokens (``.ids``, ``.offsets``)."""
    text = without_surrogates(text)
    controls = controls_of(tokenizer)
    if not controls.pattern.search(text):
        encoding = tokenizer(text, add_special_tokens=False, verbose=False).encodings[0]
        if controls.contents.keys().isdisjoint(encoding.ids):  # a normalizer can produce some
            return encoding
    return copy_of(tokenizer).encode(text)


class Controls:
    """The control tokens of a tokenizer, and how to quote them in a text.

    Control tokens are the tokenizer's special tokens, and added tokens that its chat template
    writes: some models mark the delimiters of their template as ordinary added tokens. Quoting
    replaces each of them in a text by a secret name, which no chat template writes.

    Attributes:
        tokens: control tokens in the tokenizer's order.
        contents: text of each control token by its id, except the unknown token, which can stand
            for any character.
        mark: random prefix of the secret names, so that no text contains one by chance.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        templates = tokenizer.chat_template or ""
        self._template = templates if isinstance(templates, str) else "\n".join(templates.values())
        tokens = {
            token.content: token
            for token in tokenizer.added_tokens_decoder.values()
            if token.special or (token.content.strip() and token.content in self._template)
        }
        for content in tokenizer.all_special_tokens:
            tokens.setdefault(content, AddedToken(content, normalized=False, special=True))
        self.tokens = tuple(tokens.values())
        model = tokenizer.backend_tokenizer.model if tokenizer.is_fast else None
        unknown = {tokenizer.unk_token, getattr(model, "unk_token", None)}
        self.contents = {
            tokenizer.convert_tokens_to_ids(content): content
            for content in tokens
            if content not in unknown
        }
        self.mark = token_hex(16)

    def same_as(self, other: Controls) -> bool:
        """Whether the tokenizer's control tokens and template are unchanged."""
        return (self.tokens, self._template) == (other.tokens, other._template)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Pattern of any control token, longer ones first."""
        longest_first = sorted((token.content for token in self.tokens), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches

    def quote_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Quote a message so that no string in it can become a control token or a part of one.

        Control tokens in the assistant's messages get names that templates rewritten by
        :meth:`comparing` can find, such as the delimiters of reasoning; those in other messages
        get names that no template finds.
        """
        kind = "a" if message["role"] == "assistant" else "q"
        quoted = {
            key: self._quote_name(value, kind)
            if isinstance(value, str) and key != "content"
            else self.quote(value, kind)
            for key, value in message.items()
        }
        if "tool_call_id" in message:  # as the call's own, which it is compared with
            quoted["tool_call_id"] = self.quote(message["tool_call_id"], "a")
        return quoted

    def quote(self, value: Any, kind: str = "q") -> Any:
        """Replace control tokens by secret names in a string, or in all strings of a value."""
        if isinstance(value, str):
            quoted = self.pattern.sub(lambda t: self._secret(kind, t[0]), value)
            core = value.strip()
            sides = range(1, min(len(core), self._longest) + 1)
            if any(core[:n] in self._ends or core[-n:] in self._beginnings for n in sides):
                return self._fenced(quoted)
            return quoted
        if isinstance(value, Mapping):
            return {self.quote(k, kind): self.quote(v, kind) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.quote(item, kind) for item in value]
        return value

    def _quote_name(self, text: str, kind: str) -> str:
        """Quote a role or other short string, which a template may write inside a control token."""
        if text in self._roles:
            return text
        quoted: str = self.quote(text, kind)
        core = text.strip()
        inside = bool(core) and any(core in token.content for token in self.tokens)
        return self._fenced(quoted) if inside else quoted

    def unquote(self, text: str) -> str:
        """Restore the quoted control tokens of a text."""
        return self._names.sub(lambda t: self.tokens[int(t[1])].content if t[1] else "", text)

    def comparing(self, template: str) -> str:
        """Rewrite a chat template so that its string searches find quoted control tokens.

        The control tokens that the template writes are not changed.
        """

        def string(found: re.Match[str]) -> str:
            if found["sought"] is None and found["within"] is None:
                return found[0]
            return self.pattern.sub(lambda t: self._secret("a", t[0]), found[0])

        return _BLOCK.sub(lambda block: _STRING.sub(string, block[0]), template)

    def written_out(self, encoding: Encoding, text: str) -> bool:
        """Whether all control tokens of an encoding are written out in its text.

        A tokenizer that normalizes can make one from other characters, such as full-width ones.
        """
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return all(
            text[start:end].strip() == self.contents[i].strip()
            for i, (start, end) in spans
            if i in self.contents
        )

    def _secret(self, kind: str, content: str) -> str:
        return f"{self.mark}{kind}{self._index[content]}x"

    def _fenced(self, text: str) -> str:
        """Put marks around a text, so that its neighbours cannot complete a control token in it.

        Spaces stay outside of the marks, as templates may trim them.
        """
        core = text.strip()
        return text.replace(core, f"{self.mark}b{core}{self.mark}b", 1)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {token.content: i for i, token in enumerate(self.tokens)}

    @cached_property
    def _names(self) -> re.Pattern[str]:
        # A template may change the case of a role.
        return re.compile(rf"{self.mark}(?:[aq](\d+)x|b)", re.IGNORECASE)

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(t.content[:n] for t in self.tokens for n in range(1, len(t.content)))

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset(t.content[n:] for t in self.tokens for n in range(1, len(t.content)))

    @cached_property
    def _longest(self) -> int:
        return max((len(token.content) for token in self.tokens), default=0)

    @cached_property
    def _roles(self) -> frozenset[str]:
        """Common roles and words in the template's code, which are not quoted as names."""
        blocks = _BLOCK.findall(self._template)
        words = {s["string"][1:-1] for block in blocks for s in _STRING.finditer(block)}
        return _ROLES | {word for word in words if not self.pattern.search(word)}


class LiteralTokenizer:
    """A copy of a tokenizer that encodes control tokens as ordinary text.

    The whole text is encoded in one pass, so only the control tokens change: encoding it in pieces
    would break merges at their borders and, in SentencePiece-like tokenizers, add a space to each.
    The control tokens that a chat template writes are passed in under secret names.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, controls: Controls) -> None:
        if not tokenizer.is_fast:
            raise InvalidParameterError(
                f"the text holds control tokens of {type(tokenizer).__name__}, which cannot read "
                "them as ordinary text: use the model's fast tokenizer, or remove them"
            )
        self.controls = controls
        contents = [token.content for token in controls.tokens]
        self._names = {text: f"{controls.mark}n{i}x" for i, text in enumerate(contents)}

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
                for token in controls.tokens
            ]
        )
        # The vocabulary itself can contain a control token (Unigram, WordPiece), so the text is
        # split within each one before the tokenizer's model sees it.
        inner = "|".join(f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in contents if len(t) > 1)
        steps = [backend.pre_tokenizer, pre_tokenizers.Split(Regex(inner), "isolated")]
        backend.pre_tokenizer = pre_tokenizers.Sequence([step for step in steps if step])
        self._backend = backend
        self._control_ids = {
            backend.token_to_id(name): tokenizer.convert_tokens_to_ids(text)
            for text, name in self._names.items()
        }

    def encode(self, text: str) -> Encoding:
        """Encode a text without control tokens.

        Raises:
            InvalidParameterError: the tokenizer still produces a control token.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        contents = self.controls.contents
        if not contents.keys().isdisjoint(encoding.ids):
            token = next(contents[i] for i in encoding.ids if i in contents)
            raise InvalidParameterError(
                f"the text holds {token!r}, or what the tokenizer takes for it, and it cannot be "
                "read as ordinary text: remove it"
            )
        return encoding

    def encode_rendered(self, text: str) -> list[int]:
        """Encode a rendered chat: the template's control tokens as such, quoted ones as text."""
        named = self.controls.pattern.sub(lambda t: self._names[t[0]], text)
        ids = self.encode(self.controls.unquote(named)).ids
        return [self._control_ids.get(i, i) for i in ids]


_controls: WeakKeyDictionary[PreTrainedTokenizerBase, Controls] = WeakKeyDictionary()
_copies: WeakKeyDictionary[PreTrainedTokenizerBase, LiteralTokenizer] = WeakKeyDictionary()


def controls_of(tokenizer: PreTrainedTokenizerBase) -> Controls:
    """Control tokens of a tokenizer, cached while it does not change."""
    now = Controls(tokenizer)
    known = _controls.get(tokenizer)
    if known is None or not now.same_as(known):
        known = _controls[tokenizer] = now
    return known


def copy_of(tokenizer: PreTrainedTokenizerBase) -> LiteralTokenizer:
    """The copy of a tokenizer that encodes control tokens as text, made at the first use."""
    controls = controls_of(tokenizer)
    literal = _copies.get(tokenizer)
    if literal is None or literal.controls is not controls:
        literal = _copies[tokenizer] = LiteralTokenizer(tokenizer, controls)
    return literal
