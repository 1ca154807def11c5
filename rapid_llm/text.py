"""From token ids to text while they arrive: whole characters only, cut at stop strings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import compress

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

# A decoder turns tokens into text with regard to their neighbours only: a space before the first
# token, at most 3 bytes of a character that a later token completes. So a few tokens are context
# enough, and the cost of a token does not grow with the output.
_CONTEXT_TOKENS = 8
_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class TextStream:
    """The text of a growing sequence of tokens, special tokens skipped.

    All returned pieces together equal ``tokenizer.decode`` of all tokens (special tokens skipped,
    spaces not cleaned up), cut before the stop string that is completed first; of those completed
    by the same character, before the one that starts first.

    Args:
        tokenizer: the model's tokenizer.
        stop: non-empty strings that end the text. A special token that is one of them, or part
            of one, counts where it is said, though it is never returned.

    Attributes:
        stopped: a stop string is complete. The text before it has been returned; from now on
            ``push`` and ``finish`` return nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        special.update(tokenizer.all_special_ids)
        contents = dict(zip(special, tokenizer.convert_ids_to_tokens(list(special)), strict=True))
        self._hidden = {i for i in special if any(contents[i] in s for s in self._stop)}
        self._skipped = special - self._hidden
        self._context: list[int] = []  # the last tokens of those decoded
        self._context_length = 0  # characters that they decode to
        self._bytes: list[int] = []  # a run of byte tokens, not yet decoded
        self._incomplete = ""  # decoded, but perhaps only the beginning of a character
        self._held = ""  # characters that may turn out to begin a stop string
        self._shown: list[bool] = []  # which of them are text, and not of a special token
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """Everything returned so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Add a token; the text that became final with it, often "" and never half a character."""
        if self.stopped or token_id in self._skipped:
            return ""
        if token_id in self._hidden:
            piece = self._return(self._rest())
            hidden = "" if self.stopped else self._return(self._content(token_id), shown=False)
            return piece + hidden
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # models pad their vocabulary with ids that have no text
            return ""
        if _BYTE.fullmatch(token):
            # One invalid byte makes a whole run of byte tokens unreadable: wait for its end.
            self._bytes.append(token_id)
            return ""
        return self._return(self._decode([*self._bytes, token_id]))

    def finish(self) -> str:
        """What is still held back. An incomplete character becomes U+FFFD."""
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
        """What was decoded in part, as it is without another token."""
        last = self._decode(self._bytes) if self._bytes else ""
        last, self._incomplete = last + self._incomplete, ""
        return last

    def _content(self, special: int) -> str:
        """A special token as it reads after the last tokens, with the space before it."""
        text = self._tokenizer.decode(
            [*self._context, special],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return text[self._context_length :]

    def _decode(self, new: list[int]) -> str:
        """The characters that ``new`` completes."""
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
        """Pass on what can no longer become part of a stop string."""
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
        """Length of the longest end of ``text`` with which a stop string begins."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        return next(
            (
                n
                for n in range(min(longest, len(text)), 0, -1)
                if any(s.startswith(text[-n:]) for s in self._stop)
            ),
            0,
        )
