"""Session: one model with the KV cache of one sequence: prefill, decode, verify, roll back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from rapid_llm.engine.chunks import pass_ends
from rapid_llm.engine.device import Judge, NextMask, TokenSampler
from rapid_llm.engine.kv_cache import KVCache
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.parts import Part
from rapid_llm.engine.steps import Steps, Wanted, alone
from rapid_llm.errors import OutdatedKVError
from rapid_llm.old_names import OldName
from rapid_llm.progress import Progress

Purpose = Literal["read", "draft", "verify"]
"""What a pass is for: a part of a prompt, tokens of a draft, or the verification of one."""


class Session:
    """A model runner with the KV cache of one sequence.

    KV that has become invalid, because the adapter was switched or the sequence has passed a length
    at which the rotary embedding switches, is computed again.

    Args:
        runner: the model.
        cache: the model's KV cache; may contain the beginning of the sequence.
        tokens: token ids of the sequence, at least those in the cache.
        joined: whether its passes are joined with those of other sequences, see
            :func:`extend_all`.
    """

    def __init__(
        self,
        runner: ModelRunner,
        cache: KVCache,
        tokens: Sequence[int] = (),
        *,
        joined: bool = False,
    ) -> None:
        self.runner = runner
        self.cache = cache
        self.joined = joined
        self._ends: list[int] = []  # end positions of the passes of the prefill
        self._lost: Tensor | None = None  # tokens whose KV a failed pass has still to compute again
        self._tokens = torch.empty(cache.capacity, dtype=torch.long, device=runner.device)
        self._has_tokens = cache.position_offset == 0 and len(tokens) >= cache.length
        if self._has_tokens:
            held = torch.tensor(tokens[: cache.length], dtype=torch.long, device="cpu")
            # Ids that the model lacks were replaced by its last one, see RagDrafter.
            self._tokens[: cache.length] = held.clamp(max=runner.vocab_size - 1)

    forward = OldName("runner")

    @property
    def length(self) -> int:
        """Number of tokens of the sequence that were read."""
        held = self.cache.length if self._lost is None else len(self._lost)
        return self.cache.position_offset + held

    @property
    def room(self) -> int:
        """Number of tokens until the cache is full or the rotary embedding switches."""
        ends = [at for at in self.runner.switches if at > self.length]
        return min([self.cache.capacity - self.cache.length, *(at - self.length for at in ends)])

    def prefill(self, tokens: Sequence[int], progress: Progress | None = None) -> None:
        """Read the tokens of a prompt that are not in the cache yet, in passes.

        The length of the cache must be 0 or the end of one of the passes of a whole prefill, see
        :mod:`rapid_llm.engine.chunks`, unless it borrows: what it adds is not kept.

        Args:
            tokens: token ids of the prompt without its last one, which is read later.
            progress: callback for the progress.
        """
        alone(self.reading(tokens, progress))

    def reading(self, tokens: Sequence[int], progress: Progress | None = None) -> Steps[None]:
        """The passes of :meth:`prefill`."""
        self._ends = pass_ends(len(tokens), self.runner.prefill_sizes)
        held = self.length
        assert held in (0, *self._ends) or self.cache.prefix
        for start, end in pairwise((held, *(end for end in self._ends if end > held))):
            if progress is not None:
                progress(start, len(tokens))
            part = self.runner.tensor(tokens[start:end])
            yield Extend(self, part, 1, len(tokens) + 1)
        if progress is not None:
            progress(len(tokens), len(tokens))

    def extend(self, tokens: Tensor, keep: int | None = None, whole: int | None = None) -> Tensor:
        """Read tokens and return logits.

        Args:
            tokens: token ids, int64 ``[n]``.
            keep: number of last tokens for which logits are computed; None for all.
            whole: final length in tokens of the sequence that these tokens are a part of; None
                where they end it. Tokens of a part must not cross a length at which the rotary
                embedding switches.

        Returns:
            Logits, float32 ``[keep, vocab]``, each row for the token after the one read.
        """
        self._restore()
        start, n, held = self.length, tokens.shape[0], self.cache.length
        keep = keep or n
        if whole is None:
            ends = [at - start for at in sorted(self.runner.switches) if start < at < start + n]
            if ends:  # a pass for the tokens up to each switch
                parts = pairwise((0, *ends, n))
                rows = [self.extend(tokens[at:end], whole=start + end) for at, end in parts]
                return torch.cat(rows)[n - keep :]
        self.cache.expected = whole or start + n
        try:
            logits = self.runner(tokens, self.cache, keep)
        except OutdatedKVError:
            if not self._has_tokens:
                raise
            self._lost = self._tokens[:held].clone()
            self._restore()
            logits = self.runner(tokens, self.cache, keep)
        self._remember(tokens, held)
        return logits

    def _remember(self, tokens: Tensor, held: int) -> None:
        """Note what a pass has read; after its launch, so that the device is not kept waiting."""
        if self._has_tokens:
            self._tokens[held : self.cache.length] = tokens

    def _restore(self) -> None:
        """Compute lost KV again: the prompt by the passes of its prefill, as its KV may be kept.

        After an error, as where memory runs out, it may be called again, and begins anew.
        """
        if self._lost is None:
            return
        held = self._lost
        ends = [end for end in self._ends if end <= len(held)]
        prompt = max(ends, default=0)
        rest = pass_ends(len(held) - prompt, self.runner.prefill_sizes)
        self.cache.rollback(0)
        for start, end in pairwise((0, *ends, *(prompt + end for end in rest))):
            self.runner(held[start:end], self.cache, 1)
        self._lost = None

    def draft(
        self,
        pending: Tensor,
        steps: int,
        choice: TokenSampler,
        generator: torch.Generator,
        masks: NextMask | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Read pending tokens and draft after them on the device, without the host.

        Args:
            pending: tokens of the sequence that are not in the cache yet, int64 ``[n]``.
            steps: maximum number of tokens to draft.
            choice: sampler of the draft steps.
            generator: random generator.
            masks: masks of allowed tokens, which the host computes for each drafted token; None
                without a constraint.

        Returns:
            Drafted tokens, int64 ``[at most steps]``, and the q that each was drawn from,
            ``[…, width]``; None, with nothing read, where this is not possible.
        """
        start, new = self.cache.length, len(pending) + steps - 1
        if start == 0 or self._lost is not None or self.cache.capacity - start < new:
            return None

        try:
            with self.runner.replaying(self.cache, new, generator) as replayed:
                if replayed is None:
                    return None
                loop = replayed.loop(choice)
                tokens, rows = loop(pending, steps, self.cache, generator, masks)
        except OutdatedKVError:
            return None  # the next pass computes the KV again
        self._remember(torch.cat([pending, tokens[:-1]]), start)
        return tokens, rows

    def verify(
        self,
        tokens: Tensor,
        q: Tensor,
        eta: Tensor | None,
        judge: Judge,
        generator: torch.Generator,
        mask: Callable[[], Tensor | None] | None = None,
    ) -> Tensor | None:
        """Read a draft and verify it on the device, without the host.

        Args:
            tokens: int64 ``[γ+1]``: one that is not in the cache yet, and the draft after it.
            q, eta, generator: see :class:`rapid_llm.engine.device.Judge`.
            judge: verification to run.
            mask: function for the mask of allowed tokens, see
                :class:`rapid_llm.engine.device.Judge`, called only where this is possible; None
                without a constraint.

        Returns:
            The judge's verdict; None, with nothing read, where this is not possible.
        """
        start, n = self.cache.length, tokens.shape[0]
        if start == 0 or self._lost is not None or self.cache.capacity - start < n:
            return None
        self.cache.expected = self.length + n

        try:
            with self.runner.replaying(self.cache, n, generator) as replayed:
                if replayed is None or not replayed.serves(tokens, self.cache, n):
                    return None
                verification = replayed.verification(judge)
                allowed = None if mask is None else mask()
                verdict = verification(tokens, q, eta, self.cache, generator, allowed)
        except OutdatedKVError:
            return None  # the next pass computes the KV again
        self._remember(tokens, start)
        return verdict

    def rollback(self, length: int) -> None:
        """Drop all tokens after the first ``length``."""
        length -= self.cache.position_offset
        self.cache.rollback(length)
        if self._lost is not None:
            self._lost = self._lost[:length]


@dataclass(frozen=True, eq=False)
class Extend(Wanted):
    """Wanted: logits of a session after new tokens.

    Attributes:
        session, tokens, keep, whole: see :meth:`Session.extend`.
        purpose: what the pass is for.
    """

    session: Session
    tokens: Tensor
    keep: int | None = None
    whole: int | None = None
    purpose: Purpose = "read"

    def run(self) -> Tensor:
        return self.session.extend(self.tokens, self.keep, self.whole)


@dataclass(frozen=True, eq=False)
class DraftAlone(Wanted):
    """Wanted: a draft on the device without the host, see :meth:`Session.draft`.

    None may be sent instead, with nothing run; passes of single tokens are then wanted.
    """

    session: Session
    pending: Tensor
    steps: int
    choice: TokenSampler
    generator: torch.Generator
    masks: NextMask | None

    def run(self) -> tuple[Tensor, Tensor] | None:
        return self.session.draft(self.pending, self.steps, self.choice, self.generator, self.masks)


@dataclass(frozen=True, eq=False)
class VerifyAlone(Wanted):
    """Wanted: a verdict on the device without the host, see :meth:`Session.verify`.

    None may be sent instead, with nothing run; the logits are then wanted.
    """

    session: Session
    tokens: Tensor
    q: Tensor
    eta: Tensor | None
    judge: Judge
    generator: torch.Generator
    mask: Callable[[], Tensor | None]

    def run(self) -> Tensor | None:
        judge, generator = self.judge, self.generator
        return self.session.verify(self.tokens, self.q, self.eta, judge, generator, self.mask)


def extend_all(wanted: Sequence[Extend]) -> list[Tensor]:
    """Read new tokens of several sequences of one model in one pass.

    Args:
        wanted: passes of different sessions of one runner, see :attr:`.ModelRunner.joins`. No
            session changes if the pass fails.

    Returns:
        Logits for each, see :meth:`Session.extend`.
    """
    parts = []
    for session, tokens, keep in ((each.session, each.tokens, each.keep) for each in wanted):
        session._restore()
        session.cache.expected = session.length + tokens.shape[0]
        ids = tokens.to(session.runner.device, non_blocking=True)
        parts.append(Part(ids, session.cache, keep or ids.shape[0]))
    held = [part.cache.length for part in parts]
    logits = wanted[0].session.runner.joined(parts)
    for each, length in zip(wanted, held, strict=True):
        each.session._remember(each.tokens, length)
    return logits
