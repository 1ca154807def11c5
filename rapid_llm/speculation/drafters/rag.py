"""The RAG drafter: a language model over the retrieval context, with prompt lookup."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid_llm.config import SpeculationConfig
from rapid_llm.engine.costs import PassCost, pass_cost
from rapid_llm.engine.device import FEW_TOKENS, NextMask
from rapid_llm.engine.quantized import MAX_QUANTIZED_ROWS
from rapid_llm.engine.session import DraftAlone, Extend, Session
from rapid_llm.engine.steps import Steps, alone
from rapid_llm.progress import Progress
from rapid_llm.speculation.acceptance import verify_guess
from rapid_llm.speculation.drafters.base import Draft
from rapid_llm.speculation.drafters.lookup import SIZES, NgramIndex
from rapid_llm.speculation.sampling import Fit, Sampler
from rapid_llm.speculation.schedule import (
    GUESS,
    MODEL,
    AdaptiveSchedule,
    FixedSchedule,
    Schedule,
)
from rapid_llm.stats import Origin

_FREE = PassCost(0.0, 0.0)


class RagDrafter:
    """Drafts with a model over the retrieval context.

    With ``lookup`` the tokens that followed the same n-gram in the prompts or the output are
    guessed, and one pass of the drafter verifies the guess, so that all tokens still follow q
    exactly. With ``gamma="auto"`` the length of a guess is chosen for speed. The host waits for
    each such pass, because it must know the accepted tokens before it can guess again. Where no
    guess is found, the rest of the draft runs without the host on devices that support it.

    Under a constraint q is masked, guesses end before a token that may not follow, and tokens that
    the constraint forces cost no pass: their q is the point mass that a pass would give.

    Nothing is drafted beyond the drafter's context window.

    Args:
        session: session of the drafting model with room for ``prompt`` and the output.
        prompt: token ids of the retrieval context and the question, at least one.
        sampler: sampler on the session's device.
        vocab_size: width of the target's logits. The drafter's logits may be padded to another
            width; tokens beyond the target's get probability 0.
        config: speculation options; ``lookup``, ``gamma`` and ``min_confidence`` are used.
        document: token ids of more text to guess from, usually the target's prompt.
        unknown: ids of tokens that only one of the two models has. They get probability 0, and
            nothing is drafted once the output contains one.
    """

    prior = MODEL

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        sampler: Sampler,
        vocab_size: int,
        config: SpeculationConfig,
        document: Sequence[int] = (),
        unknown: Collection[int] = (),
    ) -> None:
        self._session = session
        self._prompt = list(prompt)
        self._sampler = sampler
        self._vocab_size = vocab_size
        self._embedded = session.runner.model.get_input_embeddings().weight.shape[0]
        self._unknown = frozenset(unknown)
        self._fit = Fit(vocab_size, self._unknown, session.runner.device)
        self._choice = sampler.choice(self._fit)
        self._readable_output = 0  # number of output tokens that the model is known to have
        self._index = NgramIndex([*document, *prompt]) if config.lookup else None
        self._given = len(document) + len(prompt)
        self._guessed = len(prompt)  # position of the last guess
        self._gamma = config.gamma
        self._min_confidence = config.min_confidence

    @property
    def prompt_tokens(self) -> int:
        return len(self._prompt)

    def prefill(self, progress: Progress | None) -> None:
        """Run :meth:`reading` by itself."""
        alone(self.reading(progress))

    def reading(self, progress: Progress | None) -> Steps[None]:
        # All but the last token, which the first draft reads, when its logits are needed.
        last = self._session.runner.vocab_size - 1
        tokens = [min(token, last) for token in self._prompt[:-1]]
        yield from self._session.reading(tokens, progress)

    def cost(self) -> PassCost:
        return self._cost

    @cached_property
    def _cost(self) -> PassCost:
        return pass_cost(self._session)

    @cached_property
    def _guesses(self) -> Schedule:
        """Schedule of the lengths of guesses."""
        if self._gamma == "auto":
            return AdaptiveSchedule(self._cost, _FREE, GUESS)
        return FixedSchedule(self._gamma)

    def draft(self, output: Sequence[int], gamma: int, *, look_ahead: bool) -> Draft:
        """Run :meth:`drafting` by itself."""
        return alone(self.drafting(output, gamma, look_ahead=look_ahead))

    def drafting(self, output: Sequence[int], gamma: int, *, look_ahead: bool) -> Steps[Draft]:
        """Propose tokens in at most γ (or γ+1) forward passes, see :class:`.base.Drafter`.

        The draft is empty where the output has a token that the model lacks, or has reached its
        context window.
        """
        sequence = [*self._prompt, *output]
        # The last drafted token is not read, except for look-ahead.
        room = self._session.runner.context_window - len(sequence) + (not look_ahead)
        gamma = min(gamma, room)
        if not self._can_read(output) or gamma + look_ahead <= 0:
            device = self._session.runner.device
            nothing = torch.empty(0, dtype=torch.long, device=device)
            q = torch.empty(0, self._vocab_size, dtype=torch.float32, device=device)
            return Draft(nothing, q, passes=0)
        # Drop rejected tokens from the cache; the last token of the sequence is still to be read.
        self._session.rollback(len(sequence) - 1)
        if self._index is not None:
            self._index.extend(output[len(self._index) - self._given :])
        pending = self._session.runner.tensor(sequence[self._session.length :])
        tokens = pending.new_empty(0)
        rows: list[Tensor] = []
        passes, drafted, unsure = 0, 0, False
        origins: list[Origin] = []
        constraint = self._sampler.constraint
        known: list[int] = []  # the drafted tokens on the host, where a constraint needs them
        while drafted < gamma and not unsure:
            if constraint is not None and drafted > 0:
                known = tokens.tolist()
                if constraint.over(known):
                    break
            if constraint is not None and (certain := constraint.forced(known, gamma - drafted)):
                forced = self._session.runner.tensor(certain)
                rows.append(F.one_hot(forced, self._vocab_size).float())
                tokens, pending = torch.cat([tokens, forced]), torch.cat([pending, forced])
                drafted += len(forced)
                origins += ["grammar" for _ in certain]
                continue
            pending = yield from self._read_all_but_few(pending)
            # With a longer guess the pass would not use the quantized weights.
            limit = min(gamma - drafted - 1, MAX_QUANTIZED_ROWS - len(pending))
            guess = self._guess(sequence, tokens, limit)
            looped = None
            if len(guess) == 0:
                looped = yield from self._loop(pending, gamma - drafted, known)
            if looped is not None:
                new, q = looped
                origins += ["draft" for _ in new]
            else:
                read = torch.cat([pending, guess])
                q = yield from self._read(read, torch.cat([tokens, guess]), len(guess) + 1)
                new = self._check(q, guess)
                origins += ["lookup" for _ in new[1:]]
                origins.append("draft")
            rows.append(q[: len(new)])
            tokens, pending = torch.cat([tokens, new]), new[-1:]
            passes += 1 if looped is None else len(new)
            drafted += len(new)
            unsure = self._min_confidence > 0 and self._is_unsure(rows[-1], new)
        if look_ahead:
            pending = yield from self._read_all_but_few(pending)
            rows.append((yield from self._read(pending, tokens, 1)))
            passes += 1
        return Draft(tokens, torch.cat(rows), passes, origins)

    def _read_all_but_few(self, pending: Tensor) -> Steps[Tensor]:
        """Read tokens until few are pending, which one pass can read."""
        while len(pending) > FEW_TOKENS:  # after rounds without a draft, or many forced tokens
            yield self._extend(pending[:FEW_TOKENS], 1)
            pending = pending[FEW_TOKENS:]
        return pending

    def _loop(
        self, pending: Tensor, steps: int, drafted: list[int]
    ) -> Steps[tuple[Tensor, Tensor] | None]:
        """Draft at most ``steps`` tokens without the host; None where the host must take part.

        With a constraint the host takes part between the steps, and the draft ends before a token
        that is forced.

        Args:
            pending: tokens that are not read yet.
            steps: maximum number of tokens to draft.
            drafted: tokens drafted before, where there is a constraint.

        Returns:
            The tokens, int64 ``[at most steps]``, and their q, float32 ``[…, vocab]``.
        """
        if self._choice is None or self._min_confidence > 0:
            return None
        pending = self._readable(pending)
        masks = self._masks(drafted)
        looped: tuple[Tensor, Tensor] | None = yield DraftAlone(
            self._session, pending, steps, self._choice, self._sampler.generator, masks
        )
        return looped

    def _masks(self, drafted: list[int]) -> NextMask | None:
        """The constraint's masks for a draft loop after drafted tokens; None without one."""
        constraint = self._sampler.constraint
        if constraint is None:
            return None

        def mask(looped: list[int]) -> Tensor | None:
            seen = [*drafted, *looped]
            if looped and (constraint.over(seen) or constraint.forced(seen, 1)):
                return None
            return self._sampler.mask(seen, 1)

        return mask

    def _can_read(self, output: Sequence[int]) -> bool:
        """Whether the model has all tokens of the output."""
        new = output[self._readable_output :]
        if all(i < self._embedded and i not in self._unknown for i in new):
            self._readable_output = len(output)
            return True
        return False

    def _guess(self, sequence: Sequence[int], tokens: Tensor, limit: int) -> Tensor:
        """Guess the next tokens by lookup: int64 ``[at most limit]``."""
        if self._index is None or limit <= 0:
            return tokens[:0]
        tail = [*sequence[-max(SIZES) :], *tokens.tolist()]
        guess = self._index.guess(tail, limit)
        if guess:
            place = len(sequence) + len(tokens)
            guess = guess[: self._guesses.next(max(0, place - self._guessed))]
        if guess:
            self._guessed = place
        if guess and self._sampler.constraint is not None:
            guess = self._sampler.constraint.legal(tokens.tolist(), guess)
        return self._session.runner.tensor(guess)

    def _read(self, pending: Tensor, drafted: Tensor, keep: int) -> Steps[Tensor]:
        """Read tokens; distributions q after the last ``keep`` of them, ``[keep, vocab]``."""
        logits = self._fit((yield self._extend(pending, keep)))
        return self._sampler.scores(logits, drafted).softmax(dim=-1)

    def _extend(self, tokens: Tensor, keep: int) -> Extend:
        return Extend(self._session, self._readable(tokens), keep, purpose="draft")

    def _readable(self, tokens: Tensor) -> Tensor:
        # Replace padding ids of the target's vocabulary that this model lacks by its last id. Its
        # input may be arbitrary, as long as tokens are drawn from the q that it gives.
        own = self._session.runner.vocab_size
        return tokens if own >= self._vocab_size else tokens.clamp(max=own - 1)

    def _check(self, q: Tensor, guess: Tensor) -> Tensor:
        """Tokens of a pass: the guesses that q accepts and one token drawn after them."""
        if len(guess) == 0:
            return self._sampler.draw(q[0])[None]
        accepted, token = verify_guess(
            q, guess, self._sampler.generator, greedy=self._sampler.params.greedy
        )
        n = int(accepted)
        self._guesses.record(len(guess), n, passes=0)
        self._session.rollback(self._session.length - len(guess) + n)
        return torch.cat([guess[:n], token[None]])

    def _is_unsure(self, q: Tensor, tokens: Tensor) -> bool:
        chosen = q.gather(1, tokens[:, None])
        return bool((chosen < self._min_confidence).any())
