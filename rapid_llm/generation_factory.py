"""Set up the generation of a request: sessions over reused KV, a sampler, and the drafters."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from rapid_llm.encoding import encode_literal
from rapid_llm.engine.costs import ROOM
from rapid_llm.engine.memory import with_memory
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache.prefixes import PrefixCache
from rapid_llm.engine.prefix_cache.reading import Lease
from rapid_llm.engine.quantized_drafter import QuantizedDrafter
from rapid_llm.engine.session import Session
from rapid_llm.engine.steps import Wanted, answered
from rapid_llm.generation import DRAFTED, Generation, answering
from rapid_llm.progress import PromptProgress
from rapid_llm.request import ModelPair, Request
from rapid_llm.results import Delta
from rapid_llm.speculation.drafters import compressed
from rapid_llm.speculation.drafters.base import Drafter
from rapid_llm.speculation.drafters.lookup import CERTAIN, SIZES, PromptLookupDrafter
from rapid_llm.speculation.drafters.rag import RagDrafter
from rapid_llm.speculation.sampling import Sampler
from rapid_llm.text import TextStream


@dataclass(frozen=True)
class GenerationFactory:
    """Makes the generations of validated requests.

    Attributes:
        pair: target and drafter.
        quantized: the drafter's quantized copy.
        prefixes: cache of the KV of earlier prompts.
    """

    pair: ModelPair
    quantized: QuantizedDrafter
    prefixes: PrefixCache

    def answer(
        self, request: Request, started: float, progress: PromptProgress | None
    ) -> Iterator[Delta]:
        """Answer a request by itself and yield one delta per round, see :func:`.answering`.

        Passes run in inference mode, the caller's code between two deltas does not.
        """
        with (
            self.open(request, started) as generation,
            closing(self.steps(request, generation, progress)) as steps,
        ):
            with torch.inference_mode():
                item = next(steps, None)
            while item is not None:
                if isinstance(item, Delta):
                    yield item
                with torch.inference_mode():
                    item = answered(steps, item)

    def steps(
        self, request: Request, generation: Generation, progress: PromptProgress | None
    ) -> Generator[Wanted | Delta, Any, None]:
        """The passes that the answer to a request takes, and its deltas."""
        # A grammar counts each space, also the first.
        tokenizer = self.pair.tokenizer
        before = () if request.constraint is None else encode_literal("a", tokenizer)
        text = TextStream(tokenizer, request.sampling.stop, before)
        return answering(generation, text, request.ends, request.least_new_tokens, progress)

    @contextmanager
    def open(
        self, request: Request, started: float, *, joined: bool = False
    ) -> Iterator[Generation]:
        """A generation for a request, with KV reused from earlier calls and kept for later ones.

        Args:
            request: the request.
            started: time of the call (``time.perf_counter``).
            joined: whether its passes are joined with those of other generations, with which it
                then shares the KV of a common document.
        """
        # Ranks tell each other that the call has ended before they write what was read to files.
        with ExitStack() as leases, self._by_all(request) as request:

            def lease(runner: ModelRunner, prompt: Sequence[int]) -> tuple[Session, Lease]:
                length, new = len(prompt), request.sampling.max_new_tokens
                capacity = max(min(length + new, runner.context_window), length + ROOM)
                # Compressed drafters copy parts of the target's KV, and want it in one cache.
                together = joined and runner.joins
                share = together and request.config.drafting not in compressed.DRAFTERS
                borrowed = leases.enter_context(
                    self.prefixes.lease(runner, prompt, capacity, share=share)
                )
                if runner.ranks is not None:  # other ranks may have kept more or less of it
                    borrowed = borrowed.shortened(runner.ranks.least_kept(borrowed.reused))
                return Session(runner, borrowed.cache, prompt, joined=together), borrowed

            target, kept = lease(request.runner, request.prompt)
            runner = request.runner
            sampler = Sampler(
                request.sampling,
                request.prompt,
                runner.device,
                runner.model,
                constraint=request.constraint,
            )
            yield Generation(
                target=target,
                prompt=request.prompt,
                cached=kept.origins,
                drafters=self._drafters(request, target, sampler, lease),
                drafter_name=self.pair.drafter.name,
                sampler=sampler,
                config=request.config,
                confidence=request.confidence,
                method=request.method,
                draft_skipped=request.draft_skipped,
                started=started,
                free_memory=self.prefixes.free_devices,
            )

    @contextmanager
    def _by_all(self, request: Request) -> Iterator[Request]:
        """The request as all ranks of a sharded model answer it: with one seed."""
        ranks, sampling = request.runner.ranks, request.sampling
        if ranks is None:
            yield request
            return
        models = [(each.name, each.settings) for each in (self.pair.target, self.pair.drafter)]
        prompts = request.method, request.prompt, request.draft_prompt, request.confidence
        ends = sorted(request.ends), request.least_new_tokens
        with ranks.call(models, prompts, ends, sampling, request.config):
            if sampling.seed is None:
                seed = ranks.from_first(secrets.randbits(62))
                request = request._replace(sampling=replace(sampling, seed=seed))
            yield request

    def _drafters(
        self,
        request: Request,
        target: Session,
        sampler: Sampler,
        lease: Callable[[ModelRunner, Sequence[int]], tuple[Session, Lease]],
    ) -> list[Drafter]:
        """Drafters of a request: none, one, or two to choose from in each round."""
        config, runner, drafter = request.config, request.runner, self.pair.drafter
        if request.method not in DRAFTED:
            return []
        if config.drafting == "rest":
            return [_lookup(request, SIZES)]

        def draft_runner() -> ModelRunner:
            return with_memory(lambda: self.quantized.runner, self.prefixes.free_devices)

        if config.drafting in compressed.DRAFTERS:
            own = draft_runner() if drafter is self.pair.target else runner
            kind = compressed.DRAFTERS[config.drafting]
            return [kind(target, own, request.prompt, sampler, config)]
        session, _ = lease(draft_runner(), request.draft_prompt)
        if drafter.device != runner.device:
            model = runner.model
            sampler = Sampler(
                request.sampling, request.prompt, drafter.device, model, 1, request.constraint
            )
        rag = RagDrafter(
            session,
            request.draft_prompt,
            sampler,
            runner.vocab_size,
            config,
            request.prompt,
            self.pair.unshared,
        )
        if not (config.lookup and config.gamma == "auto" and config.applied_mode == "exact"):
            return [rag]
        # Without knowledge transfer the output does not depend on the drafter: lookup may compete.
        return [_lookup(request, CERTAIN), rag]


def _lookup(request: Request, sizes: Sequence[int]) -> PromptLookupDrafter:
    runner = request.runner
    return PromptLookupDrafter(
        request.prompt, runner.vocab_size, runner.device, sizes, request.constraint
    )
