"""Logits processors and sampling, shared by target and drafter."""

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
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.config import SamplingParams
from rapid_llm.engine.device import device_of
from rapid_llm.errors import InvalidParameterError
from rapid_llm.speculation.acceptance import draw
from rapid_llm.speculation.constraints import Mask, Matcher, masked

_MAX_TEMPERATURE = 1e30
"""Upper limit that is applied: larger values change nothing, but could overflow float32."""

_MAX_PENALTY = 1e20
"""Upper limit that is applied: larger penalties rank tokens the same, but overflow float32."""

_ROWWISE = (
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
"""Processors that depend on a row of logits only; others depend on the tokens before it."""

_CAPTURED = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
"""Processors that never wait for the device, so that a CUDA graph can contain them."""

_AFTER_MASK = (*_CAPTURED, LogitNormalization)
"""Processors that act on masked logits; the others, such as penalties, come before the mask."""

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
"""Unsupported settings of a generation config, with the value that disables each."""


def generation_config(model: PreTrainedModel) -> GenerationConfig:
    """A copy of a model's generation config.

    Raises:
        InvalidParameterError: it has a setting that is not supported, such as beam search.
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
    """Minimum length of an answer in tokens, by a generation config."""
    least_length = (config.min_length or 0) - prompt_tokens
    return max(least_length if config.min_new_tokens is None else config.min_new_tokens, 0)


def stop_strings(config: GenerationConfig) -> tuple[str, ...]:
    """Stop strings of a generation config."""
    stop = config.stop_strings or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def end_ids(
    config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, end_of_turn: int | None
) -> frozenset[int]:
    """Ids of tokens that end an answer: the model's, the tokenizer's and the chat template's.

    Args:
        config: the model's generation config.
        tokenizer: its tokenizer.
        end_of_turn: id of the chat template's end of a turn; None without one.
    """
    own = config.eos_token_id
    ids = [own] if own is None or isinstance(own, int) else list(own)
    ids += [tokenizer.eos_token_id, end_of_turn]
    return frozenset(i for i in ids if i is not None)


class Sampler:
    """transformers' logits processors in their order, and a random generator on one device.

    The processors are those that the model's ``generate`` would build from its
    ``generation_config``, except for its sampling settings; greedy decoding has no temperature,
    top-k and top-p. Target and drafter use the same processors and the same history (the target's
    prompt and the output), so that p and q differ only by the models.

    Args:
        params: sampling options.
        prompt: token ids of the target's prompt, part of the history for penalties.
        device: device of the logits.
        model: model that answers.
        stream: index of this sampler within a generation; each has its own random stream.
        constraint: the grammar of the answer, shared by the samplers of a generation; None without.

    Attributes:
        params: sampling options.
        processors: transformers' logits processors.
        generator: random generator on the device.
        constraint: the grammar of the answer; None without.

    Raises:
        InvalidParameterError: the model's ``generation_config`` is not supported.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        device: torch.device,
        model: PreTrainedModel,
        stream: int = 0,
        constraint: Matcher | None = None,
    ) -> None:
        self.params = params
        self.constraint = constraint
        self.generator = torch.Generator(device)
        if params.seed is None:
            self.generator.seed()
        else:
            # Seeds of streams are far apart, so that another seed of the user does not match one.
            self.generator.manual_seed((params.seed + stream * 0x9E3779B97F4A7C15) % 2**63)
        self.processors = _processors(model, params, prompt, device)
        later = [isinstance(processor, _AFTER_MASK) for processor in self.processors]
        first = later.index(True) if any(later) else len(later)
        self._before_mask = LogitsProcessorList(self.processors[:first])
        self._after_mask = LogitsProcessorList(self.processors[first:])
        rowwise = all(isinstance(processor, _ROWWISE) for processor in self.processors)
        self._history = None if rowwise else torch.tensor(prompt, device=device)

    def choice(self, fit: Fit) -> TokenSampler | None:
        """Sampler for draft steps on the device; None where tokens depend on the history.

        Args:
            fit: maps the drafter's logits to the target's vocabulary.
        """
        settings = self.settings
        if settings is None:
            return None
        return TokenSampler(
            (settings, fit.unknown), fit.width, fit, self.processors, self.params.greedy
        )

    @property
    def settings(self) -> tuple[Any, ...] | None:
        """Key of the sampling, equal for samplers that turn the same logits into the same tokens.

        None where :attr:`processors` depend on the history or wait for the device.
        """
        if not all(type(each) in _CAPTURED for each in self.processors):
            return None
        each_one = ((type(each).__name__, *sorted(vars(each).items())) for each in self.processors)
        return (*each_one, self.params.greedy)

    def scores(self, logits: Tensor, drafted: Tensor) -> Tensor:
        """Apply the logits processors, and the constraint where transformers puts a processor.

        Args:
            logits: float32 ``[n, vocab]``; the last row follows all of ``drafted``, the row
                before it all but one, and so on.
            drafted: tokens after the history, int64 ``[at least n - 1]``.

        Returns:
            Processed logits s, float32 ``[n, vocab]``; their softmax is p (or q).
        """
        n, total = logits.shape[0], drafted.shape[0]
        mask: Tensor | Mask | None = None
        if self.constraint is not None:
            on_host = logits.device.type == "cpu"
            mask = (self.constraint if on_host else self).mask(drafted.tolist(), n)
        if self._history is None:
            return self._processed(None, logits, mask)
        rows = [
            self._processed(
                torch.cat([self._history, drafted[: total - n + 1 + i]])[None],
                logits[i : i + 1],
                None if mask is None else mask[i : i + 1],
            )
            for i in range(n)
        ]
        return torch.cat(rows)

    def _processed(self, ids: Tensor | None, logits: Tensor, mask: Tensor | Mask | None) -> Tensor:
        if mask is None:
            return self.processors(ids, logits)
        return self._after_mask(ids, masked(self._before_mask(ids, logits), mask))

    def mask(self, drafted: Sequence[int], rows: int) -> Tensor | None:
        """Mask of the constraint on the device, see :meth:`.constraints.Matcher.mask`.

        None without a constraint.
        """
        if self.constraint is None:
            return None
        device = self.generator.device
        mask = torch.from_numpy(self.constraint.mask(drafted, rows))
        return device_of(device).upload(mask, device)

    def draw(self, probabilities: Tensor) -> Tensor:
        """Choose a token: the argmax when greedy, a draw otherwise.

        Args:
            probabilities: float32 ``[vocab]``.

        Returns:
            The token, an int64 scalar.
        """
        if self.params.greedy:
            return probabilities.argmax()
        return draw(probabilities, self.generator)

    def commit(self, tokens: Sequence[int]) -> None:
        """Append tokens of the output to the history, and to the constraint."""
        if self.constraint is not None:
            self.constraint.commit(tokens)
        if self._history is not None:
            new = torch.tensor(tokens, device=self._history.device)
            self._history = torch.cat([self._history, new])


def _processors(
    model: PreTrainedModel, params: SamplingParams, prompt: Sequence[int], device: torch.device
) -> LogitsProcessorList:
    """transformers' processors for the model's generation config and the sampling options."""
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
    # Pass the prompt only where it is needed: transformers waits for the device to inspect it.
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
    """Maps a drafter's logits to the target's vocabulary.

    Args:
        width: width of the target's logits; tokens that the drafter lacks get probability 0.
        unknown: ids of other tokens that get probability 0.
        device: device of the logits.
    """

    def __init__(self, width: int, unknown: frozenset[int], device: torch.device) -> None:
        self.width, self.unknown = width, unknown
        impossible = [token for token in sorted(unknown) if token < width]
        self._impossible = torch.tensor(impossible, dtype=torch.long, device=device)

    def __call__(self, logits: Tensor) -> Tensor:
        """Map logits ``[n, vocab]`` to ``[n, width]``."""
        surplus = self.width - logits.shape[-1]
        if surplus:
            logits = F.pad(logits, (0, surplus), value=float("-inf"))
        if len(self._impossible):
            logits = logits.index_fill(-1, self._impossible, float("-inf"))
        return logits


@dataclass(frozen=True)
class TokenSampler:
    """A sampler without history, for draft steps that run without the host.

    Attributes:
        key: key of the sampling, equal for samplers that draw the same way.
        width: vocabulary size of q.
    """

    key: tuple[Any, ...]
    width: int
    _fit: Fit = field(compare=False)
    _processors: LogitsProcessorList = field(compare=False)
    _greedy: bool = field(compare=False)

    def __call__(
        self, logits: Tensor, generator: torch.Generator, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sample a token; see :class:`rapid_llm.engine.device.TokenSampler`."""
        logits = self._fit(logits)
        if mask is not None:
            logits = masked(logits, mask)
        q = self._processors(None, logits).softmax(dim=-1)[0]
        return q, q.argmax() if self._greedy else draw(q, generator)
