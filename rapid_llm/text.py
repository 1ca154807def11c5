"""From token ids to text while they arrive: whole characters only, cut at stop strings."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
        stop: non-empty strings that end the text.

    Attributes:
        stopped: a stop string is complete. The text before it has been returned; from now on
            ``push`` and ``finish`` return nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skipped = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._skipped.update(tokenizer.all_special_ids)
        self._context: list[int] = []  # the last tokens of those decoded
        self._context_length = 0  # characters that they decode to
        self._bytes: list[int] = []  # a run of byte tokens, not yet decoded
        self._incomplete = ""  # decoded, but perhaps only the beginning of a character
        self._held = ""  # characters that may turn out to begin a stop string
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """Everything returned so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Add a token; the text that became final with it, often "" and never half a character."""
        if self.stopped or token_id in self._skipped:
            return ""
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
        last = self._decode(self._bytes) if self._bytes else ""
        last, self._incomplete = last + self._incomplete, ""
        piece = self._return(last)
        if not self.stopped:
            piece += self._held
            self._pieces.append(self._held)
            self._held = ""
        return piece

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

    def _return(self, fresh: str) -> str:
        """Pass on what can no longer become part of a stop string."""
        text = self._held + fresh
        found = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped = True
            piece, self._held = text[: min(found)[1]], ""
        else:
            keep = self._possible_stop(text)
            piece, self._held = text[: len(text) - keep], text[len(text) - keep :]
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
