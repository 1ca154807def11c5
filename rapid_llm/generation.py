"""The generation loop of RAPID: draft, verify, accept.

A generation holds the target's session, its drafters, a sampler and the output so far. It reads the
prompts, then runs rounds. In each round a drafter proposes γ tokens and the target verifies them in
one pass; the output grows by the longest accepted prefix and one token after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rapid_llm.config import SpeculationConfig
from rapid_llm.engine.costs import pass_cost
from rapid_llm.engine.device import FEW_TOKENS
from rapid_llm.engine.memory import attempts
from rapid_llm.engine.prefix_cache.tiers import Tier
from rapid_llm.engine.session import Extend, Session, VerifyAlone
from rapid_llm.engine.steps import Steps, Wanted, alone
from rapid_llm.errors import GenerationTimeoutError, NumericalError
from rapid_llm.progress import PromptProgress
from rapid_llm.results import Delta, FinishReason
from rapid_llm.speculation.acceptance import dynamic_eta
from rapid_llm.speculation.drafters.base import Draft, Drafter
from rapid_llm.speculation.sampling import Sampler
from rapid_llm.speculation.schedule import AdaptiveSchedule, FixedSchedule, Schedule
from rapid_llm.speculation.verification import Judge, Verdict, verify
from rapid_llm.stats import NOTHING_PAID, Method, Origin, Stats
from rapid_llm.text import TextStream

NAN_LOGITS = "{name} produced NaN logits; check its weights, or load it in another dtype"
"""Message of a NumericalError, with the name of the model."""

DRAFTED: tuple[Method, ...] = ("rapid", "sd")
"""Methods in which the target verifies drafts."""

_T = TypeVar("_T")


@dataclass
class _DrafterState:
    """A drafter, its schedule of draft lengths, and the output length after its last draft."""

    drafter: Drafter
    schedule: Schedule
    drafted: int = 0

    def lag(self, output_length: int) -> int:
        """Number of output tokens after its last draft, which the drafter must read first."""
        return max(0, output_length - self.drafted)


class Generation:
    """The state of one generation, and its rounds.

    Args:
        target: session of the model that answers.
        prompt: token ids of the prompt to answer.
        cached: number of prompt tokens whose KV was reused, by the tier that they come from.
        drafters: drafters to choose from in each round; empty for plain decoding.
        drafter_name: name of the drafter in errors.
        sampler: logits processors and random numbers.
        config: speculation options.
        confidence: confidence of the retrieval, in [0, 1].
        method: method to report once something was drafted.
        draft_skipped: reason why nothing can be drafted; None where drafting is possible.
        started: time of the call (``time.perf_counter``), from which the timeout counts.
        free_memory: function that frees idle memory, called when a step runs out of it.

    Attributes:
        sequences: number of generations whose passes are joined, from which γ follows.
    """

    def __init__(
        self,
        target: Session,
        prompt: Sequence[int],
        cached: Mapping[Tier, int],
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
        self.sequences = 1
        self.sampler = sampler
        self.config = config
        self._confidence = confidence
        self._method = method
        self._started = started
        self._free_memory = free_memory
        self._prompt = list(prompt)
        self._output: list[int] = []
        self.origins: tuple[Origin, ...] = ()  # of the last round's tokens
        self._drafter_name = drafter_name
        self._judge = Judge.of(sampler, config, target.runner.vocab_size)
        self._drafters = drafters
        self._drafter_states: list[_DrafterState] = []
        self.stats = Stats(
            method="lc" if method in DRAFTED else method,
            prompt_tokens=len(self._prompt),
            cached_tokens=sum(cached.values()),
            cached_tokens_host=cached.get("host", 0),
            cached_tokens_disk=cached.get("disk", 0),
            max_new_tokens=sampler.params.max_new_tokens,
            draft_prompt_tokens=sum(drafter.prompt_tokens for drafter in drafters),
            draft_skipped=NOTHING_PAID if method in DRAFTED else draft_skipped,
        )

    @torch.inference_mode()
    def prefill(self, progress: PromptProgress | None) -> None:
        """Run :meth:`reading` by itself."""
        alone(self.reading(progress))

    def reading(self, progress: PromptProgress | None) -> Steps[None]:
        """Read both prompts except their last tokens, which the first round reads."""
        started = time.perf_counter()
        # A retry goes on where it stopped.
        yield from self._with_memory(partial(self._read_prompts, progress))
        self.target.runner.synchronize()  # so that the prefill's time is not the first round's
        self.stats.prefill_seconds = time.perf_counter() - started

    def _read_prompts(self, progress: PromptProgress | None) -> Steps[None]:
        def report(whose: Literal["target", "draft"], done: int, total: int) -> None:
            self.require_time()
            if progress is not None:
                progress(whose, done, total)

        yield from self.target.reading(self._prompt[:-1], partial(report, "target"))
        for drafter in self._drafters:
            yield from drafter.reading(partial(report, "draft"))
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
        self._drafter_states = list(map(_DrafterState, self._drafters, schedules))

    @torch.inference_mode()
    def round(self) -> list[int]:
        """Run one :meth:`rounding` by itself."""
        return alone(self.rounding())

    def rounding(self) -> Steps[list[int]]:
        """One round with one pass of the target; returns its 1 to γ+1 new tokens."""
        started = time.perf_counter()
        draft, schedule = yield from self._with_memory(self._draft)
        self.stats.draft_seconds += time.perf_counter() - started

        judged = yield from self._with_memory(partial(self._verify, draft))
        verdict = Verdict.read(judged)  # the only host synchronisation of the round
        if verdict.target_nan or verdict.drafter_nan:
            name = self.target.runner.name if verdict.target_nan else self._drafter_name
            raise NumericalError(NAN_LOGITS.format(name=name))
        drafted, n = verdict.drafted, verdict.accepted
        self.stats.rounds += 1
        if schedule is not None:
            self.stats.drafted_tokens += len(drafted)
            self.stats.accepted_tokens += n
            self.stats.rejections += n < len(drafted)
            self.stats.draft_passes += draft.passes
            if drafted:
                self.stats.method, self.stats.draft_skipped = self._method, None
            schedule.record(len(drafted), n, draft.passes)
        self.stats.decode_seconds += time.perf_counter() - started
        known: Sequence[Origin] = draft.origins or ["draft" for _ in drafted]
        self.origins = (*known[:n], "target")
        return [*drafted[:n], verdict.token]

    def _draft(self) -> Steps[tuple[Draft, Schedule | None]]:
        """Draft with the drafter of the highest expected speedup that has something to propose.

        Returns:
            The draft on the target's device and the drafter's schedule. Without drafters, or where
            no draft is worth its time, only tokens that the constraint forces, and None.
        """
        device = self.target.runner.device
        # Even the last token is drafted, so that all tokens follow the mode's distribution.
        remaining = self.sampler.params.max_new_tokens - len(self._output)
        # A draft must not cross a length at which the rotary embedding switches: the sequence would
        # be read again, and once more if the draft is rejected.
        remaining = min(remaining, max(1, self.target.room - 1))
        look_ahead = self.config.applied_mode == "augmented"
        length = len(self._output)

        for state in self._drafter_states:
            state.schedule.sequences = self.sequences

        def speedup(state: _DrafterState) -> float:
            return state.schedule.speedup(state.lag(length))

        for state in sorted(self._drafter_states, key=speedup, reverse=True):
            gamma = min(state.schedule.next(state.lag(length)), remaining)
            if gamma + look_ahead == 0:
                continue
            draft = yield from state.drafter.drafting(self._output, gamma, look_ahead=look_ahead)
            if len(draft.probabilities) > 0:
                state.drafted = length + len(draft.tokens)
                q = draft.probabilities.to(device)
                tokens = draft.tokens.to(device)
                return Draft(tokens, q, draft.passes, draft.origins), state.schedule
        constraint = self.sampler.constraint
        limit = min(remaining, FEW_TOKENS)
        certain = [] if constraint is None else constraint.forced((), limit)
        tokens = torch.empty(0, dtype=torch.long, device=device)
        if certain:
            tokens = self.target.runner.tensor(certain)
        q = F.one_hot(tokens, self.target.runner.vocab_size).float()
        return Draft(tokens, q, 0, ["grammar" for _ in certain]), None

    def _verify(self, draft: Draft) -> Steps[Tensor]:
        """Run the target over the draft and judge it; the result is read by :class:`Verdict`."""
        # The last output token is not in the cache yet. The logits after token i - 1 judge token i.
        pending = self.target.runner.tensor(self._output[-1:] or self._prompt[-1:])
        tokens, q = torch.cat([pending, draft.tokens]), draft.probabilities
        strength = self.config.transfer_strength
        eta: Tensor | None = None
        if self.config.dynamic_eta and strength > 0:
            eta = dynamic_eta(strength, self._confidence, len(self._output), q)
        generator = self.sampler.generator
        if self._judge is not None:

            def mask() -> Tensor | None:
                known = [] if self.sampler.constraint is None else draft.tokens.tolist()
                return self.sampler.mask(known, len(tokens))

            verdict: Tensor | None = yield VerifyAlone(
                self.target, tokens, q, eta, self._judge, generator, mask
            )
            if verdict is not None:
                return verdict
        logits = yield Extend(self.target, tokens, purpose="verify")
        s = self.sampler.scores(logits, draft.tokens)
        draws = None if self.sampler.params.greedy else generator
        return verify(logits, s, draft.tokens, q, eta, self.config, draws)

    def _with_memory(self, step: Callable[[], Steps[_T]]) -> Steps[_T]:
        """Run a step; when memory runs out, free idle memory and run the step again."""
        generator = self.sampler.generator
        drawn = generator.get_state()

        def start_again() -> None:
            self.target.rollback(self._read)
            generator.set_state(drawn)  # a seed gives the same answer however often it is tried
            self._free_memory()

        for attempt in attempts(start_again):
            with attempt:
                return (yield from step())
        raise AssertionError("the last attempt returns or raises")

    def require_time(self) -> None:
        """Raise GenerationTimeoutError if the sampling's ``timeout`` has passed."""
        sampling, ranks = self.sampler.params, self.target.runner.ranks
        if sampling.timeout is None:
            return
        late = time.perf_counter() - self._started > sampling.timeout
        if ranks is not None:  # or one would stop, and leave the others alone in a pass
            late = ranks.from_first(late)
        if not late:
            return
        raise GenerationTimeoutError(
            f"timeout={sampling.timeout:g} s passed after {len(self._output)} of at most "
            f"{sampling.max_new_tokens} tokens: raise the timeout, lower max_new_tokens, or "
            "shorten the prompt"
        )

    @property
    def _read(self) -> int:
        """Number of tokens in the target's cache between rounds: all but the last."""
        return len(self._prompt) + len(self._output) - 1

    def keep(self, tokens: Sequence[int]) -> None:
        """Append the tokens of a round to the output and roll the target back to them."""
        self._output += tokens
        self.stats.completion_tokens = len(self._output)
        self.sampler.commit(tokens)
        if self.sampler.constraint is not None:
            self.stats.mask_seconds = self.sampler.constraint.seconds
        self.target.rollback(self._read)
        if self.stats.time_to_first_token is None:
            self.stats.time_to_first_token = time.perf_counter() - self._started


def answering(
    generation: Generation,
    text: TextStream,
    ends: Collection[int],
    least_new_tokens: int,
    progress: PromptProgress | None,
) -> Generator[Wanted | Delta, Any, None]:
    """Read the prompts, run rounds until the answer ends, and yield one delta per round.

    Args:
        generation: the generation; nothing of it was run yet.
        text: detokenizer of the answer.
        ends: ids of tokens that end the answer.
        least_new_tokens: minimum length of the answer, in tokens, before they end it.
        progress: callback for the progress of the prefill.

    Raises:
        GenerationTimeoutError: the sampling's ``timeout`` has passed.
        NumericalError: a model produced NaN.
    """
    yield from generation.reading(progress)
    stats, limit = generation.stats, generation.sampler.params.max_new_tokens
    constraint = generation.sampler.constraint
    finish: FinishReason | None = None
    if constraint is not None and constraint.over():  # only the empty answer is allowed
        finish = "stop"
        yield Delta(text.finish(), (), finish, replace(stats))
    while finish is None:
        new: list[int] = []
        pieces: list[str] = []
        for token in (yield from generation.rounding()):
            new.append(token)
            length = stats.completion_tokens + len(new)
            if token in ends and length > least_new_tokens:
                finish = "stop"
                break
            pieces.append(text.push(token))
            if text.stopped or (constraint is not None and constraint.over(new)):
                finish = "stop"
                break
            if length == limit:
                finish = "length"
                break
        if finish is not None:
            pieces.append(text.finish())
            finish = "stop" if text.stopped else finish
        generation.keep(new)
        if finish is None:
            generation.require_time()
        origins = generation.origins[: len(new)]
        yield Delta("".join(pieces), tuple(new), finish, replace(stats), origins)
