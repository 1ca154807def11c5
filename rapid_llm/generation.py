"""RAPID's algorithm: draft, verify, accept.

A generation is the target's session, its drafters, a sampler and the output so far. It reads the
prompts, then goes on in rounds: a drafter proposes γ tokens, the target verifies them in one pass,
and the round ends with the longest prefix that the target accepts and one token after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import isnan
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid_llm.config import SpeculationConfig
from rapid_llm.engine.costs import pass_cost
from rapid_llm.engine.session import Session
from rapid_llm.errors import GenerationTimeoutError, NumericalError
from rapid_llm.speculation.acceptance import dynamic_eta
from rapid_llm.speculation.drafters.base import Draft, Drafter
from rapid_llm.speculation.sampling import Sampler
from rapid_llm.speculation.schedule import AdaptiveSchedule, FixedSchedule, Schedule
from rapid_llm.speculation.verification import Judge, Verdict, verify
from rapid_llm.stats import NOTHING_PAID, Method, Stats
from rapid_llm.text import TextStream

FinishReason = Literal["stop", "length"]
_NAN = "{name} produced NaN logits; check its weights, or load it in another dtype"
DRAFTED: tuple[Method, ...] = ("rapid", "sd")
"""Methods in which the target verifies drafts."""

_TRIES = 4  # for memory: a step may need several graphs, each of which may ask for it

_T = TypeVar("_T")

Progress = Callable[[Literal["draft", "target"], int, int], None]
"""Called during prefill with (whose prompt, tokens read, tokens to read)."""


@dataclass(frozen=True)
class Delta:
    """What one round added.

    Attributes:
        text: final text; empty while a character or a stop string may still be incomplete.
        token_ids: the round's tokens.
        finish_reason: set on the last delta: ``stop`` (an end-of-sequence token of the model or the
            tokenizer, the chat template's end of a turn, or a stop string) or ``length``
            (``max_new_tokens``).
        stats: running totals, complete on the last delta.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stats: Stats


@dataclass(frozen=True)
class GenerationResult:
    """A finished answer.

    Attributes:
        text: without special tokens, cut before a stop string.
        token_ids: every token generated, the ending one included.
        finish_reason: ``stop`` or ``length``.
        stats: counts and seconds.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats

    @classmethod
    def from_deltas(cls, deltas: Sequence[Delta]) -> GenerationResult:
        """The answer that a stream, read to its end, has given."""
        last = deltas[-1]
        assert last.finish_reason is not None
        return cls(
            text="".join(delta.text for delta in deltas),
            token_ids=[token for delta in deltas for token in delta.token_ids],
            finish_reason=last.finish_reason,
            stats=last.stats,
        )


@dataclass
class _Source:
    """A drafter, how many tokens are to be had of it, and where its last draft ended."""

    drafter: Drafter
    schedule: Schedule
    drafted: int = 0

    def lag(self, said: int) -> int:
        """Tokens of the answer after that draft, all of which the drafter must read first."""
        return max(0, said - self.drafted)


class Generation:
    """One generation: the target's session, its drafters, and the output so far."""

    def __init__(
        self,
        target: Session,
        prompt: Sequence[int],
        cached: int,
        drafters: Sequence[Drafter],
        drafter_name: str,
        sampler: Sampler,
        config: SpeculationConfig,
        confidence: float,
        method: Method,
        draft_skipped: str | None,
        started: float,
        free_memory: Callable[[], None],
    ) -> None:
        self.target = target
        self.sampler = sampler
        self.config = config
        self._confidence = confidence
        self._method = method
        self._started = started
        self._free_memory = free_memory
        self._prompt = list(prompt)
        self._output: list[int] = []
        self._drafter_name = drafter_name
        self._judge = Judge.of(sampler, config, target.runner.vocab_size)
        self._drafters = drafters
        self._sources: list[_Source] = []
        self.stats = Stats(
            method="lc" if method in DRAFTED else method,
            prompt_tokens=len(self._prompt),
            cached_tokens=cached,
            max_new_tokens=sampler.params.max_new_tokens,
            draft_prompt_tokens=sum(drafter.prompt_tokens for drafter in drafters),
            draft_skipped=NOTHING_PAID if method in DRAFTED else draft_skipped,
        )

    @torch.inference_mode()
    def prefill(self, progress: Progress | None) -> None:
        """Read both prompts, all but their last tokens: the first round reads those."""
        started = time.perf_counter()
        self._with_memory(partial(self._prefill, progress))  # goes on where it stopped
        self.target.runner.synchronize()  # or the first round would be charged with the prefill
        self.stats.prefill_seconds = time.perf_counter() - started

    def _prefill(self, progress: Progress | None) -> None:
        def report(whose: Literal["target", "draft"], done: int, total: int) -> None:
            self._require_time()
            if progress is not None:
                progress(whose, done, total)

        self.target.prefill(self._prompt[:-1], partial(report, "target"))
        for drafter in self._drafters:
            drafter.prefill(partial(report, "draft"))
        gamma = self.config.gamma
        schedules: list[Schedule] = []
        if gamma != "auto":
            schedules = [FixedSchedule(gamma) for _ in self._drafters]
        elif self._drafters:
            cost, always = pass_cost(self.target), self.config.transfer_strength > 0
            schedules = [
                AdaptiveSchedule(cost, drafter.cost(), drafter.prior, always=always)
                for drafter in self._drafters
            ]
        self._sources = list(map(_Source, self._drafters, schedules))

    def deltas(
        self, text: TextStream, ends: Collection[int], least_new_tokens: int
    ) -> Iterator[Delta]:
        """Rounds until the answer ends. Only the steps run in inference mode, never the caller.

        Args:
            text: of the answer.
            ends: tokens that end it.
            least_new_tokens: tokens that none of them may end before.

        Raises:
            GenerationTimeoutError: the sampling's ``timeout`` has passed.
            NumericalError: a model produced NaN.
        """
        stats, limit = self.stats, self.sampler.params.max_new_tokens
        finish: FinishReason | None = None
        while finish is None:
            new: list[int] = []
            pieces: list[str] = []
            for token in self.round():
                new.append(token)
                said = stats.completion_tokens + len(new)
                if token in ends and said > least_new_tokens:
                    finish = "stop"
                    break
                pieces.append(text.push(token))
                if text.stopped:
                    finish = "stop"
                    break
                if said == limit:
                    finish = "length"
                    break
            if finish is not None:
                pieces.append(text.finish())
                finish = "stop" if text.stopped else finish
            self.keep(new)
            if stats.time_to_first_token is None:
                stats.time_to_first_token = time.perf_counter() - self._started
            if finish is None:
                self._require_time()
            yield Delta("".join(pieces), tuple(new), finish, replace(stats))

    @torch.inference_mode()
    def round(self) -> list[int]:
        """Draft, verify, accept: one pass of the target; between 1 and γ+1 tokens."""
        started = time.perf_counter()
        draft, schedule = self._with_memory(self._draft)
        self.stats.draft_seconds += time.perf_counter() - started

        judged = self._with_memory(partial(self._verify, draft))
        verdict = Verdict.read(judged)  # the one host sync
        if verdict.target_nan or verdict.drafter_nan:
            name = self.target.runner.name if verdict.target_nan else self._drafter_name
            raise NumericalError(_NAN.format(name=name))
        drafted, n = verdict.drafted, verdict.accepted
        self.stats.rounds += 1
        self.stats.drafted_tokens += len(drafted)
        self.stats.accepted_tokens += n
        self.stats.rejections += n < len(drafted)
        self.stats.draft_passes += draft.passes
        if drafted:
            self.stats.method, self.stats.draft_skipped = self._method, None
        if schedule is not None:
            schedule.record(len(drafted), n, draft.passes)
        self.stats.decode_seconds += time.perf_counter() - started
        return [*drafted[:n], verdict.token]

    def _draft(self) -> tuple[Draft, Schedule | None]:
        """A proposal, on the target's device, of the drafter that promises most and has one.

        It is empty, and of no schedule, without a drafter or where none is worth its time.
        """
        device = self.target.runner.device
        # Even the last token is drafted, so that every one follows the mode's law.
        remaining = self.sampler.params.max_new_tokens - len(self._output)
        # Not across a length at which all would be read again, and once more if it is rejected.
        remaining = min(remaining, max(1, self.target.room - 1))
        look_ahead = self.config.applied_mode == "augmented"
        said = len(self._output)

        def promise(source: _Source) -> float:
            return source.schedule.speedup(source.lag(said))

        for source in sorted(self._sources, key=promise, reverse=True):
            gamma = min(source.schedule.next(source.lag(said)), remaining)
            if gamma + look_ahead == 0:
                continue
            draft = source.drafter.draft(self._output, gamma, look_ahead=look_ahead)
            if len(draft.probabilities) > 0:
                source.drafted = said + len(draft.tokens)
                q = draft.probabilities.to(device)
                return Draft(draft.tokens.to(device), q, draft.passes), source.schedule
        nothing = torch.empty(0, dtype=torch.long, device=device)
        vocab_size = self.target.runner.vocab_size
        q = torch.empty(0, vocab_size, dtype=torch.float32, device=device)
        return Draft(nothing, q, passes=0), None

    def _verify(self, draft: Draft) -> Tensor:
        """One pass of the target over the draft, and what it makes of it: a :class:`Verdict`."""
        # The last token was not read. Position i is judged by the logits that follow token i - 1.
        pending = self.target.runner.tensor(self._output[-1:] or self._prompt[-1:])
        tokens, q = torch.cat([pending, draft.tokens]), draft.probabilities
        strength = self.config.transfer_strength
        eta: Tensor | None = None
        if self.config.dynamic_eta and strength > 0:
            eta = dynamic_eta(strength, self._confidence, len(self._output), q)
        generator = self.sampler.generator
        if self._judge is not None:
            verdict = self.target.verify(tokens, q, eta, self._judge, generator)
            if verdict is not None:
                return verdict
        logits = self.target.extend(tokens)
        s = self.sampler.scores(logits, draft.tokens)
        draws = None if self.sampler.params.greedy else generator
        return verify(logits, s, draft.tokens, q, eta, self.config, draws)

    def _with_memory(self, step: Callable[[], _T]) -> _T:
        """A step; where memory runs out, what is idle is freed and the step is tried again."""
        for _ in range(_TRIES):
            with suppress(torch.OutOfMemoryError):  # whose traceback would hold what was allocated
                return step()
            self.target.rollback(self._read)
            self._free_memory()
        return step()

    def _require_time(self) -> None:
        sampling = self.sampler.params
        if sampling.timeout is None or time.perf_counter() - self._started <= sampling.timeout:
            return
        raise GenerationTimeoutError(
            f"timeout={sampling.timeout:g} s passed after {len(self._output)} of at most "
            f"{sampling.max_new_tokens} tokens: raise the timeout, lower max_new_tokens, or "
            "shorten the prompt"
        )

    @property
    def _read(self) -> int:
        """Tokens that the target has read between rounds: all but the last."""
        return len(self._prompt) + len(self._output) - 1

    def keep(self, tokens: Sequence[int]) -> None:
        """Append a round's tokens, as many as the answer takes, and forget the rest."""
        self._output += tokens
        self.stats.completion_tokens = len(self._output)
        self.sampler.commit(tokens)
        self.target.rollback(self._read)


@torch.inference_mode()
def log_likelihood(session: Session, prompt: list[int], continuation: list[int]) -> float:
    """The natural logarithm of the probability that a model continues a prompt so.

    Raises:
        NumericalError: the model produced NaN.
    """
    session.prefill(prompt[:-1])
    device = session.runner.device
    logits = session.extend(torch.tensor([prompt[-1], *continuation[:-1]], device=device))
    wanted = torch.tensor(continuation, device=device)
    total = -F.cross_entropy(logits, wanted, reduction="sum").item()
    if isnan(total):
        raise NumericalError(_NAN.format(name=session.runner.name))
    return total
