"""Constraints on answers: which tokens may follow, by a grammar that llguidance reads.

The tokens that may follow depend only on the tokens before them, so target and drafter share one
mask per position. The rules of all modes apply unchanged to the p and q of masked logits.
"""

from __future__ import annotations

import ctypes
import json
import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.engine.device import mask_words
from rapid_llm.errors import InvalidParameterError
from rapid_llm.grammar_limits import in_deep_stack
from rapid_llm.grammars import llguidance_grammar, one_line

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Floats: TypeAlias = npt.NDArray[np.float32]
Mask: TypeAlias = npt.NDArray[np.int32]

_WORD = 32  # bits of a word of a mask
_KEPT = 64  # compiled grammars that are kept
_GRAMMAR_END = "<|end of grammar|>"
_OCTETS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"),
    np.float32("inf"),
    np.float32("-inf"),
)
"""Highest logits of 8 tokens by 8 bits of a mask, float32 ``[256, 8]``."""


def masked(logits: Tensor, mask: Tensor | Mask) -> Tensor:
    """Logits with -inf for tokens that may not follow.

    If earlier logits processors forbid every allowed token, such as a suppressed token that the
    grammar requires, the allowed tokens get equal logits.

    Args:
        logits: float32 ``[n, vocab]``.
        mask: a bit for each token, int32 ``[n, at least vocab / 32]``, the lowest bit first; an
            array for logits on the host.
    """
    if not isinstance(mask, Tensor):
        return torch.from_numpy(_masked_on_host(logits.numpy(force=True), mask))
    highest = _shifted(mask, logits.shape[-1])
    kept = torch.minimum(logits, highest)
    best = kept.amax(dim=-1, keepdim=True)
    return kept.masked_fill_((best == -math.inf) & (highest > 0), 0.0)


def _masked_on_host(logits: Floats, mask: Mask) -> Floats:
    """:func:`masked` in few calls: after a model's pass each costs more than its work."""
    kept = _highest(mask, logits.shape[-1])
    np.minimum(logits, kept, out=kept)
    for row, best in enumerate(kept.argmax(axis=-1).tolist()):
        if kept[row, best] == -math.inf:
            kept[row, _highest(mask[row : row + 1], logits.shape[-1])[0] > 0] = 0.0
    return kept


def _highest(mask: Mask, width: int) -> Floats:
    """Highest logits by a mask: +inf for tokens that may follow, -inf for others.

    Args:
        mask: int32 ``[n, at least width / 32]``.
        width: vocabulary size.

    Returns:
        float32 ``[n, width]``.
    """
    octets = mask.view(np.uint8)  # a table is many times faster than choosing bit by bit
    return _OCTETS.take(octets, axis=0).reshape(len(mask), -1)[:, :width]


def _shifted(mask: Tensor, width: int) -> Tensor:
    """:func:`_highest` by operators that run on any device and in a CUDA graph."""
    shifts = torch.arange(_WORD, dtype=torch.int32, device=mask.device)
    bits = ((mask[:, :, None] >> shifts) & 1).flatten(1)[:, :width]
    return (2 * bits - 1).float() * float("inf")


class Constraints:
    """Compiles constraints for one tokenizer, each once.

    Args:
        tokenizer: tokenizer of the models.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._compiled: dict[str, LLMatcher] = {}
        self._tokens: LLTokenizer | None = None
        self._end = 0  # a token of llguidance's own, which stands for the end of the grammar
        self._lock = Lock()

    def matcher(
        self,
        constraint: Mapping[str, Any],
        width: int,
        ends: Collection[int],
        least_new_tokens: int,
    ) -> Matcher:
        """A matcher at the beginning of an answer.

        Args:
            constraint: canonical constraint, see :func:`rapid_llm.grammars.canonical`.
            width: vocabulary size of the target.
            ends: ids of tokens that end an answer.
            least_new_tokens: minimum length of an answer in tokens before they may end it, except
                where nothing else may follow.

        Raises:
            InvalidParameterError: the constraint cannot be enforced with this tokenizer.
            MissingDependencyError: llguidance is not installed.
        """
        key = json.dumps(constraint)
        with self._lock:
            compiled = self._compiled.pop(key, None) or self._compile(key)
            self._compiled[key] = compiled
            if len(self._compiled) > _KEPT:
                del self._compiled[next(iter(self._compiled))]
            matcher = compiled.deep_copy()
            assert self._tokens is not None
            tokens = self._tokens.vocab_size
        return Matcher(matcher, tokens, width, self._end, ends, least_new_tokens)

    def _compile(self, constraint: str) -> LLMatcher:
        grammar = llguidance_grammar(constraint)
        from llguidance import LLMatcher

        if self._tokens is None:
            self._tokens = self._read_tokenizer()
        tokens = self._tokens
        matcher = in_deep_stack(lambda: LLMatcher(tokens, grammar, log_level=0))
        if error := matcher.get_error():
            raise InvalidParameterError(f"constraint cannot be enforced: {one_line(error)}")
        return matcher

    def _read_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer
        from tokenizers import AddedToken, Tokenizer

        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise InvalidParameterError(
                f"constraint needs a tokenizer of the tokenizers library, which "
                f"{type(self._tokenizer).__name__} is not; load the model with its tokenizer.json"
            )
        own = Tokenizer.from_str(backend.to_str())
        own.no_padding()
        own.no_truncation()
        # A separate token for the end, because an answer may end with any of several tokens, or
        # with none (``ignore_eos``).
        own.add_special_tokens([AddedToken(_GRAMMAR_END, special=True)])
        end = own.token_to_id(_GRAMMAR_END)
        assert end is not None
        self._end = end
        try:
            return LLTokenizer(own.to_str(), eos_token=self._end)
        except ValueError as error:
            raise InvalidParameterError(
                f"constraint cannot be enforced with this tokenizer: {one_line(error)}"
            ) from error


class Matcher:
    """State of a grammar within one answer, shared by target and drafter.

    The state is the one after the tokens passed to :meth:`commit`. The other methods look ahead at
    drafted tokens; those that the previous call has read are not read again.

    Args:
        matcher: llguidance's matcher at the beginning of an answer.
        tokens: vocabulary size of the tokenizer that the grammar reads.
        width: vocabulary size of the target.
        end: id of the token that stands for the end of the grammar.
        ends: ids of tokens that end an answer; the grammar never reads them.
        least_new_tokens: see :meth:`Constraints.matcher`.

    Attributes:
        seconds: time spent in the grammar.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        tokens: int,
        width: int,
        end: int,
        ends: Collection[int],
        least_new_tokens: int,
    ) -> None:
        self.seconds = 0.0
        self._matcher = matcher
        self._end = end
        self._ends = frozenset(ends)
        self._least = least_new_tokens
        self._committed = 0
        self._drafted: list[int] = []
        self._read = 0  # number of drafted tokens that the grammar has read
        # Masks are plain bytes, changed in few places: when a model's weights have just passed
        # through the caches, each call of numpy costs more than the grammar's own mask.
        words, read = mask_words(width), mask_words(tokens)
        self._buffer = bytearray(4 * max(words, read))
        self._written = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer)), 4 * read
        self._nothing = bytes(4 * words)
        beyond = range(width, 8 * len(self._nothing))
        self._never = _octets((end, *self._ends, *beyond), len(self._buffer))
        self._ending = _octets((i for i in self._ends if i < width), len(self._nothing))
        self._rows: list[bytearray] = []  # mask after each number of drafted tokens
        self._over: list[bool] = []  # whether nothing may follow them
        self._look()

    def mask(self, drafted: Sequence[int], rows: int) -> Mask:
        """Masks of the position after all of ``drafted``, and of those before it.

        Args:
            drafted: tokens after the answer so far.
            rows: number of masks: the last is for the position after all of ``drafted``, the one
                before it for that after all but one, and so on.

        Returns:
            A bit for each token, int32 ``[rows, vocab / 32]``, see :func:`masked`.
        """
        self._reach(drafted)
        last = len(drafted) + 1
        octets = bytearray().join(self._rows[last - rows : last])
        return np.frombuffer(octets, np.int32).reshape(rows, -1)

    def over(self, drafted: Sequence[int] = ()) -> bool:
        """Whether the grammar is complete after these tokens and nothing may follow."""
        self._reach(drafted)
        return self._over[len(drafted)]

    def forced(self, drafted: Sequence[int], limit: int) -> list[int]:
        """The next tokens where the grammar leaves no choice, at most ``limit``.

        The masked p and q of each are the same point mass, in any mode and at any temperature.
        """
        seen = list(drafted)
        while len(seen) < len(drafted) + limit:
            self._reach(seen)
            only = None if self._over[len(seen)] else _only(self._rows[len(seen)])
            if only is None:
                break
            seen.append(only)
        return seen[len(drafted) :]

    def legal(self, drafted: Sequence[int], guess: Sequence[int]) -> list[int]:
        """The longest beginning of a guess that may follow ``drafted``."""
        seen = list(drafted)
        for token in guess:
            if self.over(seen) or not _has(self._rows[len(seen)], token):
                break
            seen.append(token)
        return seen[len(drafted) :]

    def commit(self, tokens: Sequence[int]) -> None:
        """Append tokens to the answer."""
        self._reach(tokens)
        self._forget(len(tokens))
        self._committed += len(tokens)
        self._drafted, self._read = [], 0
        self._rows, self._over = self._rows[-1:], self._over[-1:]

    def _reach(self, drafted: Sequence[int]) -> None:
        """Read drafted tokens, except those that the previous call has read."""
        wanted = list(drafted)
        same = len(wanted)
        while self._drafted[:same] != wanted[:same]:
            same -= 1
        if same == len(wanted):
            return
        started = time.perf_counter()
        if same < len(self._drafted):
            self._forget(same)
        for token in wanted[same:]:
            # Tokens after the end are never part of the answer. A token that may not follow is
            # drafted only from a q of NaN, which the verification reports.
            ended = self._over[-1] or token in self._ends or not _has(self._rows[-1], token)
            self._drafted.append(token)
            if ended:
                self._rows.append(self._after_end())
                self._over.append(True)
                continue
            if not self._matcher.consume_token(token):
                raise self._stuck()
            self._read += 1
            self._look()
        self.seconds += time.perf_counter() - started

    def _forget(self, kept: int) -> None:
        """Go back to the first ``kept`` drafted tokens."""
        if self._read > kept:
            if not self._matcher.rollback(self._read - kept):
                raise self._stuck()
            self._read = kept
        del self._drafted[kept:], self._rows[kept + 1 :], self._over[kept + 1 :]

    def _look(self) -> None:
        """Record the mask after the tokens that the grammar has read."""
        self._matcher.unsafe_compute_mask_ptr(*self._written)
        may_end = _has(self._buffer, self._end)
        for place, bits in self._never.items():
            self._buffer[place] &= ~bits
        row = self._buffer[: len(self._nothing)]
        complete = row == self._nothing
        if complete and not may_end:
            raise self._stuck()
        if complete:
            row = self._after_end()
        elif may_end and self._committed + len(self._drafted) >= self._least:
            _set(row, self._ending)
        self._rows.append(row)
        self._over.append(complete)

    def _after_end(self) -> bytearray:
        """Mask of tokens that are never part of the answer: those that end one, or else any."""
        row = bytearray(self._nothing)
        _set(row, self._ending or {0: 1})
        return row

    def _stuck(self) -> InvalidParameterError:
        reason = self._matcher.get_error() or "the tokenizer has no token that may follow"
        return InvalidParameterError(
            f"constraint cannot be followed after {self._committed + len(self._drafted)} tokens: "
            f"{one_line(reason)}; simplify it"
        )


def _octets(tokens: Iterable[int], size: int) -> dict[int, int]:
    """Bits of tokens by the place of their byte in a mask of ``size`` bytes."""
    octets: dict[int, int] = {}
    for place, bit in ((token // 8, 1 << token % 8) for token in tokens if token < 8 * size):
        octets[place] = octets.get(place, 0) | bit
    return octets


def _set(row: bytearray, octets: Mapping[int, int]) -> None:
    for place, bits in octets.items():
        row[place] |= bits


def _only(row: bytearray) -> int | None:
    """The one bit that is set; None if several are."""
    octets = row.strip(b"\0")
    only = octets[0]
    if len(octets) > 1 or only & (only - 1):
        return None
    return 8 * row.index(only) + only.bit_length() - 1


def _has(row: bytearray, token: int) -> bool:
    return token < 8 * len(row) and bool(row[token // 8] >> token % 8 & 1)
