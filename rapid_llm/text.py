"""Incremental detokenizer: token ids to text in whole characters, cut at stop strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import compress

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# The text of a token depends on its neighbours only: a space before the first token, at most 3
# bytes of a character that a later token completes. So decoding a token needs only a few tokens
# before it, and its cost does not grow with the output.
_CONTEXT_TOKENS = 8
_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class TextStream:
    """Decodes a growing sequence of tokens to text, without special tokens.

    The returned pieces together equal ``tokenizer.decode`` of all tokens (special tokens skipped,
    spaces not cleaned up), cut before the stop string that is completed first; of several completed
    by the same character, before the one that starts first.

    Args:
        tokenizer: the model's tokenizer.
        stop: non-empty strings that end the text. A special token that is a stop string, or part
            of one, is matched but never returned.
        before: tokens before the text. Without any, some tokenizers drop a space at its beginning.

    Attributes:
        stopped: whether a stop string was completed. The text before it has been returned;
            ``push`` and ``finish`` return nothing more.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        before: Sequence[int] = (),
    ) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        special.update(tokenizer.all_special_ids)
        contents = dict(zip(special, tokenizer.convert_ids_to_tokens(list(special)), strict=True))
        self._hidden = {i for i in special if any(contents[i] in s for s in self._stop)}
        self._skipped = special - self._hidden
        self._context = list(before)  # last decoded tokens
        self._context_length = len(self._text_of(self._context))
        self._bytes: list[int] = []  # run of byte tokens, not yet decoded
        self._incomplete = ""  # U+FFFD where the last character may be incomplete
        self._held = ""  # characters that may be the beginning of a stop string
        self._shown: list[bool] = []  # for each held character, False if of a special token
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Add a token and return the new text that is final: whole characters, possibly none."""
        if self.stopped or token_id in self._skipped:
            return ""
        if token_id in self._hidden:
            piece = self._return(self._rest())
            hidden = "" if self.stopped else self._return(self._content(token_id), shown=False)
            return piece + hidden
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # a padding id of the vocabulary, which has no text
            return ""
        if _BYTE.fullmatch(token):
            # One invalid byte makes the whole run of byte tokens undecodable: wait for its end.
            self._bytes.append(token_id)
            return ""
        return self._return(self._decode([*self._bytes, token_id]))

    def finish(self) -> str:
        """Return the text that is still held back; an incomplete character becomes U+FFFD."""
        if self.stopped:
            return ""
        piece = self._return(self._rest())
        if not self.stopped:
            last = "".join(compress(self._held, self._shown))
            self._pieces.append(last)
            self._held, self._shown = "", []
            piece += last
        return piece

    def _rest(self) -> str:
        """Text of pending bytes and of an incomplete character, as if no token followed."""
        last = self._decode(self._bytes) if self._bytes else ""
        last, self._incomplete = last + self._incomplete, ""
        return last

    def _content(self, special: int) -> str:
        """Text of a special token after the last tokens, including a space before it."""
        text = self._tokenizer.decode(
            [*self._context, special],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return text[self._context_length :]

    def _decode(self, new: list[int]) -> str:
        """Decode new tokens and return the characters that they complete."""
        window = self._context + new
        text = self._text_of(window)
        fresh = text[self._context_length - len(self._incomplete) :]
        # A trailing U+FFFD may be a character whose last bytes are still to come.
        self._incomplete = _REPLACEMENT if fresh.endswith(_REPLACEMENT) else ""
        self._bytes = []
        self._context = window[-_CONTEXT_TOKENS:]
        self._context_length = len(self._text_of(self._context))
        return fresh.removesuffix(_REPLACEMENT)

    def _text_of(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _return(self, fresh: str, *, shown: bool = True) -> str:
        """Add new text, and return the text that can no longer be part of a stop string."""
        text, mask = self._held + fresh, [*self._shown, *[shown] * len(fresh)]
        found = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped = True
            end, self._held, self._shown = min(found)[1], "", []
        else:
            end = len(text) - self._possible_stop(text)
            self._held, self._shown = text[end:], mask[end:]
        piece = "".join(compress(text[:end], mask))
        self._pieces.append(piece)
        return piece

    def _possible_stop(self, text: str) -> int:
        """Length of the longest suffix of ``text`` that is a prefix of a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        return next(
            (
                n
                for n in range(min(longest, len(text)), 0, -1)
                if any(s.startswith(text[-n:]) for s in self._stop)
            ),
            0,
        )
