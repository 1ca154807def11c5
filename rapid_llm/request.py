"""A validated request: encoded prompts, limits, and what ends the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.encoding import Prompt, encode_prompt
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.errors import ContextWindowError, InvalidParameterError, TokenizerMismatchError
from rapid_llm.generation import DRAFTED
from rapid_llm.options import given, real
from rapid_llm.speculation.constraints import Constraints, Matcher
from rapid_llm.speculation.drafters import compressed
from rapid_llm.speculation.sampling import (
    end_ids,
    generation_config,
    least_new_tokens,
    stop_strings,
)
from rapid_llm.stats import NO_DRAFT_PROMPT, Method
from rapid_llm.vocabulary import unreadable


class Request(NamedTuple):
    """A validated call.

    Attributes:
        prompt: token ids of the prompt to answer.
        draft_prompt: token ids of the draft prompt; empty where nothing drafts, or the drafter
            has no prompt.
        draft_skipped: reason why nothing can be drafted; None where drafting is possible.
        runner: the model that answers.
        sampling: sampling options, with ``max_new_tokens`` limited by the context window and the
            model's own stop strings.
        ends: ids of tokens that end the answer.
        least_new_tokens: minimum length of the answer in tokens.
        constraint: the grammar of the answer; None without.
        config: speculation options.
        confidence: confidence of the retrieval, in [0, 1].
        method: the requested method.
    """

    prompt: list[int]
    draft_prompt: list[int]
    draft_skipped: str | None
    runner: ModelRunner
    sampling: SamplingParams
    ends: frozenset[int]
    least_new_tokens: int
    constraint: Matcher | None
    config: SpeculationConfig
    confidence: float
    method: Method


@dataclass(frozen=True)
class ModelPair:
    """A target, its drafter, and the tokenizer of both.

    Attributes:
        target: the model that verifies.
        drafter: the model that drafts; the target itself in self-speculation.
        tokenizer: the target's tokenizer.
        unshared: ids of added tokens that only one of the two models has.
        end_of_turn: id of the chat template's end of a turn; None without one.
        constraints: compiler of constraints for the tokenizer.
    """

    target: ModelRunner
    drafter: ModelRunner
    tokenizer: PreTrainedTokenizerBase
    unshared: frozenset[int]
    end_of_turn: int | None
    constraints: Constraints

    def request(
        self,
        target_prompt: Prompt | None,
        draft_prompt: Prompt | None,
        sampling: SamplingParams,
        speculation: SpeculationConfig | None,
        confidence: float,
        chat_template_kwargs: Mapping[str, Any],
    ) -> Request:
        """Validate the arguments of a call and encode its prompts, before a model runs."""
        sure = real(confidence)
        if sure is None or not 0 <= sure <= 1:
            raise InvalidParameterError(
                f"confidence={confidence!r} is not allowed: confidence must be within [0, 1]"
            )
        config = given(speculation, SpeculationConfig, "speculation")
        method: Method = "lc"
        runner, own_prompt = self.target, config.drafting == "rag"
        if target_prompt is None:
            if draft_prompt is None:
                raise InvalidParameterError(
                    "target_prompt and draft_prompt are both None; give at least one prompt"
                )
            method, runner = "rag", self.drafter
            target_prompt, draft_prompt = draft_prompt, None
        elif draft_prompt is not None or not own_prompt:
            method = "rapid" if config.transfer_strength > 0 else "sd"
        if method in DRAFTED and config.drafting in compressed.DRAFTERS:
            compressed.require_compressible(runner, config.drafting)
        prompt = encode_prompt(target_prompt, self.tokenizer, chat_template_kwargs)
        self.require_readable(prompt, runner)
        new = min(sampling.max_new_tokens, self.room(prompt, runner))
        draft: list[int] = []
        draft_skipped = NO_DRAFT_PROMPT if method == "lc" else None
        if draft_prompt is not None and own_prompt:
            draft = encode_prompt(draft_prompt, self.tokenizer, chat_template_kwargs)
            draft_skipped = self._unreadable(draft, self.drafter)
            if draft_skipped is None and len(draft) >= (window := self.drafter.context_window):
                draft_skipped = (
                    f"has {len(draft)} tokens, the context window of {self.drafter.name} {window}"
                )
            if draft_skipped is not None:
                draft_skipped = f"the draft prompt {draft_skipped}"
                draft, method = [], "lc"
        settings = generation_config(runner.model)
        ends: frozenset[int] = frozenset()
        if not sampling.ignore_eos:
            ends = end_ids(settings, self.tokenizer, self.end_of_turn)
        least = least_new_tokens(settings, len(prompt))
        constraint = None
        if isinstance(sampling.constraint, Mapping):  # always, after SamplingParams' validation
            constraint = self.constraints.matcher(
                sampling.constraint, runner.vocab_size, ends, least
            )
        return Request(
            prompt=prompt,
            draft_prompt=draft,
            draft_skipped=draft_skipped,
            runner=runner,
            sampling=replace(
                sampling, max_new_tokens=new, stop=(*sampling.stop, *stop_strings(settings))
            ),
            ends=ends,
            least_new_tokens=least,
            constraint=constraint,
            config=config,
            confidence=sure,
            method=method,
        )

    def room(self, prompt: Sequence[int], runner: ModelRunner) -> int:
        """Number of tokens that the context window leaves for the answer, at least 1."""
        window = runner.context_window
        if len(prompt) >= window:
            raise ContextWindowError(
                f"the prompt has {len(prompt)} tokens, the context window of {runner.name} "
                f"{window}, and the answer needs at least one; shorten the prompt by "
                f"{len(prompt) + 1 - window} tokens"
            )
        return window - len(prompt)

    def require_readable(self, prompt: Sequence[int], runner: ModelRunner) -> None:
        """Raise TokenizerMismatchError if a model lacks a token of a prompt."""
        if (reason := self._unreadable(prompt, runner)) is not None:
            raise TokenizerMismatchError(
                f"the prompt {reason}; take it out of the prompt, or take a model that was given "
                "embeddings for all tokens of the tokenizer (resize_token_embeddings)"
            )

    def _unreadable(self, prompt: Sequence[int], runner: ModelRunner) -> str | None:
        unshared = self.unshared if runner is not self.target else frozenset()
        return unreadable(prompt, runner, self.tokenizer, unshared)
