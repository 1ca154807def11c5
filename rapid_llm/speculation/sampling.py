"""From a model's logits to the distribution that tokens are drawn from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    PreTrainedModel,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rapid_llm.config import SamplingParams
from rapid_llm.errors import InvalidParameterError
from rapid_llm.speculation.acceptance import draw

_MAX_TEMPERATURE = 1e30
"""At a greater one tokens are as likely, but float32 would take it for infinity."""

_MAX_PENALTY = 1e20
"""A greater repetition penalty orders tokens alike, but its products do not fit into float32."""

_ROWWISE = (
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
"""Processors that look at a row of logits only; the others must know the tokens before it."""

_CAPTURED = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
"""Those that never wait for the device, so that a draft step can hold them."""

_OTHER_WARPERS = ("epsilon_cutoff", "eta_cutoff", "min_p", "top_h", "typical_p")

_UNSUPPORTED = {
    "constraints": None,
    "dola_layers": None,
    "force_words_ids": None,
    "guidance_scale": 1,
    "num_beams": 1,
    "penalty_alpha": 0,
    "token_healing": False,
    "watermarking_config": None,
}
"""Settings that ask for what is not done here, with the value that asks for nothing."""


def generation_config(model: PreTrainedModel) -> GenerationConfig:
    """A copy of what a model's own ``generate`` would follow.

    Raises:
        InvalidParameterError: it asks for another search than ours, or for another model's help.
    """
    config = copy.deepcopy(getattr(model, "generation_config", None) or GenerationConfig())
    for name, nothing in _UNSUPPORTED.items():
        value = getattr(config, name, None)
        if value is not None and value != nothing:
            raise InvalidParameterError(
                f"the model's generation_config has {name}={value!r}, which cannot be followed "
                f"here: set model.generation_config.{name} = None to do without it"
            )
    return config


def least_new_tokens(config: GenerationConfig, prompt_tokens: int) -> int:
    """Tokens of an answer that none may end before."""
    least_length = (config.min_length or 0) - prompt_tokens
    return max(least_length if config.min_new_tokens is None else config.min_new_tokens, 0)


class Sampler:
    """transformers' own processors in their own order, and the random numbers of one device.

    They are what the model's ``generate`` would build: its ``generation_config`` counts, but for
    how it samples; greedy decoding has no temperature, top-k and top-p. Target and drafter see the
    same processors and the same history (the target's prompt and the output), so that p and q
    differ by what the models think, not by what was penalised.

    Args:
        params: what the caller asked for.
        prompt: the target's prompt, which penalties count as history.
        device: where logits are and draws are made.
        model: the one that answers.
        stream: number of this sampler within one generation; each has its own random stream.

    Attributes:
        processors: transformers'.
        generator: draws on the device.

    Raises:
        InvalidParameterError: the model's ``generation_config`` cannot be followed.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        device: torch.device,
        model: PreTrainedModel,
        stream: int = 0,
    ) -> None:
        self.params = params
        self.generator = torch.Generator(device)
        if params.seed is None:
            self.generator.seed()
        else:
            # Streams lie far apart, so that seed + 1 of a user is no stream of ours.
            self.generator.manual_seed((params.seed + stream * 0x9E3779B97F4A7C15) % 2**63)
        self.processors = _processors(model, params, prompt, device)
        rowwise = all(isinstance(processor, _ROWWISE) for processor in self.processors)
        self._history = None if rowwise else torch.tensor(prompt, device=device)

    def choice(self, fit: Fit) -> TokenSampler | None:
        """How to draw from what a model says; None where more counts than its last logits."""
        settings = self.settings
        if settings is None:
            return None
        return TokenSampler(
            (settings, fit.unknown), fit.width, fit, self.processors, self.params.greedy
        )

    @property
    def settings(self) -> tuple[Any, ...] | None:
        """Equal where logits become tokens alike; None where more counts than the last logits.

        There :attr:`processors` need no history and never wait for the device.
        """
        if not all(type(each) in _CAPTURED for each in self.processors):
            return None
        each_one = ((type(each).__name__, *sorted(vars(each).items())) for each in self.processors)
        return (*each_one, self.params.greedy)

    def scores(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """Process logits.

        Args:
            logits: float32 ``[n, vocab]``; the last row follows all of ``drafted``, the row
                before it all but one, and so on.
            drafted: int64 ``[at least n - 1]``, tokens after the history.

        Returns:
            float32 ``[n, vocab]``: s for the target; its softmax is p (or q).
        """
        if self._history is None:
            return self.processors(None, logits)
        n, total = logits.shape[0], drafted.shape[0]
        rows = [
            self.processors(
                torch.cat([self._history, drafted[: total - n + 1 + i]])[None], logits[i : i + 1]
            )
            for i in range(n)
        ]
        return torch.cat(rows)

    def draw(self, probabilities: Tensor) -> Tensor:
        """One token from float32 ``[vocab]``: the argmax when greedy, a draw otherwise."""
        if self.params.greedy:
            return probabilities.argmax()
        return draw(probabilities, self.generator)

    def commit(self, tokens: Sequence[int]) -> None:
        """Add tokens of the output to the history."""
        if self._history is not None:
            new = torch.tensor(tokens, device=self._history.device)
            self._history = torch.cat([self._history, new])


def _processors(
    model: PreTrainedModel, params: SamplingParams, prompt: Sequence[int], device: torch.device
) -> LogitsProcessorList:
    """What transformers makes of the model's settings and the caller's."""
    config, prompt_tokens = generation_config(model), len(prompt)
    config.do_sample = not params.greedy
    config.temperature = min(params.temperature, _MAX_TEMPERATURE)
    config.top_k, config.top_p = params.top_k, params.top_p
    for name in _OTHER_WARPERS:
        setattr(config, name, None)
    config.max_length = prompt_tokens + params.max_new_tokens
    if params.repetition_penalty is not None:
        config.repetition_penalty = params.repetition_penalty
    if config.repetition_penalty is not None:
        penalty = float(config.repetition_penalty)
        config.repetition_penalty = min(max(penalty, 1 / _MAX_PENALTY), _MAX_PENALTY)
    if config.min_new_tokens is not None:
        config.min_length = config.min_new_tokens + prompt_tokens
    builder: Any = model
    # Only where they are needed: transformers waits for the device to look at them.
    encoded = any((config.encoder_repetition_penalty, config.encoder_no_repeat_ngram_size))
    try:
        eos = config.eos_token_id
        if eos is not None:
            eos = torch.tensor([eos] if isinstance(eos, int) else eos, device=device)
        config._eos_token_tensor = eos
        processors: LogitsProcessorList = builder._get_logits_processor(
            config,
            input_ids_seq_length=prompt_tokens,
            encoder_input_ids=torch.tensor([prompt], device=device) if encoded else None,
            device=device,
        )
    except (TypeError, ValueError) as error:
        raise InvalidParameterError(
            f"the model's generation_config cannot be followed ({error}): correct it"
        ) from error
    return processors


class Fit:
    """Logits of a model as logits over the target's vocabulary.

    Args:
        width: of the target's logits; tokens that the model does not have get no probability.
        unknown: tokens that get none either.
        device: where logits are.
    """

    def __init__(self, width: int, unknown: frozenset[int], device: torch.device) -> None:
        self.width, self.unknown = width, unknown
        impossible = [token for token in sorted(unknown) if token < width]
        self._impossible = torch.tensor(impossible, dtype=torch.long, device=device)

    def __call__(self, logits: Tensor) -> Tensor:
        """``[n, vocab]`` to ``[n, width]``."""
        surplus = self.width - logits.shape[-1]
        if surplus:
            logits = F.pad(logits, (0, surplus), value=float("-inf"))
        if len(self._impossible):
            logits = logits.index_fill(-1, self._impossible, float("-inf"))
        return logits


@dataclass(frozen=True)
class TokenSampler:
    """A sampler without a history, for draft steps that run without the host.

    Attributes:
        key: equal where tokens are drawn alike.
        width: tokens that q is over.
    """

    key: tuple[Any, ...]
    width: int
    _fit: Fit = field(compare=False)
    _processors: LogitsProcessorList = field(compare=False)
    _greedy: bool = field(compare=False)

    def __call__(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Float32 ``[1, vocab]`` to q, ``[width]``, and a token drawn from it, an int64 scalar."""
        q = self._processors(None, self._fit(logits)).softmax(dim=-1)[0]
        return q, q.argmax() if self._greedy else draw(q, generator)
