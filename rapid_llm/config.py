"""What a caller can choose for one generation: how to sample, and how to speculate."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, Literal, TypeVar, get_args

from rapid_llm.errors import InvalidParameterError

Mode = Literal["exact", "augmented", "paper"]
Drafting = Literal["rag", "streaming", "triforce", "rest"]
OnEmpty = Literal["empty", "read_all"]
"""What is read where nothing was retrieved: nothing, or every document."""

Quantization = Literal["auto", "int8", "int4"]

_Number = TypeVar("_Number", int, float)

MIN_TEMPERATURE = 1e-5
"""Below it decoding is greedy: float32 could not hold the logits, and no other token would come."""

MAX_ETA = 1e30
"""Above it float32 could not hold the transfer."""


def require_on_empty(on_empty: str) -> None:
    """Raises InvalidParameterError if there is no such choice."""
    if on_empty not in get_args(OnEmpty):
        raise InvalidParameterError(
            f"on_empty={on_empty!r} is not allowed: 'empty' reads nothing where nothing was "
            "retrieved, 'read_all' every document"
        )


def _require(ok: bool, name: str, value: object, limit: str) -> None:
    if not ok:
        raise InvalidParameterError(f"{name}={value!r} is not allowed: {name} must be {limit}")


def _settle(
    settings: object,
    name: str,
    convert: Callable[[Any], _Number | None],
    limit: str,
    allowed: Callable[[_Number], bool],
) -> None:
    """Make an attribute of a frozen dataclass Python's own number, which must be within a limit."""
    given = getattr(settings, name)
    value = convert(given)
    _require(value is not None and allowed(value), name, given, limit)
    object.__setattr__(settings, name, value)


def whole(value: Any) -> int | None:
    """The whole number that a value is, as Python's own; None for anything else, a bool too."""
    if type(value) is int:  # most are, and a prompt has many
        return value
    return None if _is_no_scalar(value) else _converted(operator.index, value)


def real(value: Any) -> float | None:
    """The finite number that a value is, as Python's own; None for anything else, a bool too."""
    number = None if _is_no_scalar(value) else _converted(float, value)
    return number if number is not None and isfinite(number) else None


def _is_no_scalar(value: Any) -> bool:
    """Whether it is no number, of Python, NumPy or torch, although it may convert to one."""
    kind = str(getattr(value, "dtype", ""))
    return isinstance(value, bool | str | bytes) or "bool" in kind or getattr(value, "ndim", 0) > 0


def _converted(convert: Callable[[Any], _Number], value: Any) -> _Number | None:
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. The same processors act on target (p) and drafter (q).

    What the answering model's ``generation_config`` says counts too, where it changes what greedy
    decoding gives: penalties, suppressed and forced tokens, the least length, stop strings. Its
    settings for sampling (``do_sample``, ``temperature``, ``top_p``, …), its greatest length and
    its time limit do not: these are here, or nowhere. Numbers may be Python's, NumPy's or torch
    scalars.

    Attributes:
        temperature: 0 (or less than 1e-5) decodes greedily; above, it divides the logits.
        top_p: nucleus mass in (0, 1]; 1 keeps everything.
        top_k: number of most likely tokens kept; 0 keeps everything.
        repetition_penalty: above 0; 1 is none (Keskar et al. 2019, as in transformers); None is
            what the model's ``generation_config`` says.
        max_new_tokens: tokens to generate at most.
        stop: strings that end the answer; they are cut from the text.
        seed: seeds the draws, so that one call is reproducible on one device; None draws afresh.
        ignore_eos: go on after an end-of-sequence token (for measurements).

    Raises:
        InvalidParameterError: a value is outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float | None = None
    max_new_tokens: int = 128
    stop: Sequence[str] = ()
    seed: int | None = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        _require(
            isinstance(stop, Iterable) and all(isinstance(s, str) and s for s in stop),
            "stop",
            self.stop,
            "a list of non-empty strings",
        )
        object.__setattr__(self, "stop", tuple(stop))
        _settle(self, "temperature", real, "a number of at least 0 (0 is greedy)", lambda t: t >= 0)
        _settle(self, "top_p", real, "in (0, 1] (1 keeps every token)", lambda p: 0 < p <= 1)
        _settle(
            self,
            "top_k",
            whole,
            "a whole number of at least 0 (0 keeps every token)",
            lambda k: k >= 0,
        )
        if self.repetition_penalty is not None:
            _settle(
                self, "repetition_penalty", real, "a number above 0 (1 is none)", lambda r: r > 0
            )
        _settle(self, "max_new_tokens", whole, "a whole number of at least 1", lambda n: n >= 1)
        if self.seed is not None:
            _settle(
                self,
                "seed",
                whole,
                "None or a whole number from 0 to 2**63 - 1",
                lambda seed: 0 <= seed < 2**63,
            )

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE


@dataclass(frozen=True)
class SpeculationConfig:
    """How drafts are made and judged (RAPID, arXiv 2502.20330; see ``speculation.acceptance``).

    Attributes:
        gamma: tokens drafted a round (γ), at least 1 (the paper uses 10); or ``auto``: each round
            takes what the costs and the acceptance so far make fastest; 0 included, unless drafts
            transfer knowledge (η > 0). The costs are measured once for each machine, architecture
            and context length and kept on disk (see ``engine.costs``), so that calls can be
            repeated.
        eta: strength of the knowledge transfer (η), from 0 to 1e30. The paper uses 5 to 20 for
            self-speculation, 40 to 50 when the drafter is larger. ``exact`` does not use it.
        dynamic_eta: let η follow how sure the retrieval was and how far the answer is: token t of
            it gets η · confidence · 2^(-t / 32), with the ``confidence`` given to the decoder (see
            ``context.confidence``). The paper leaves such a rule to future work; this one is ours.
        alpha: tail protection in [0, 1]: tokens with q < alpha * max(q) get no transfer.
        mode: ``exact`` keeps the target's own distribution, ``augmented`` follows the enriched
            distribution, ``paper`` is the published rule, which follows neither.
        drafting: what drafts. ``rag``, the drafter over the retrieval context; the others read no
            context of their own and are there to be compared: ``streaming`` and ``triforce``, the
            target over the latest or the most attended part of its KV (see
            ``speculation.drafters.compressed``), and ``rest``, lookup in the target's prompt,
            which has no distribution to transfer and is always ``exact``.
        lookup: let the drafter check, in one pass, tokens that followed the last ones in either
            prompt or in the answer; in ``exact`` mode with ``gamma="auto"`` the target checks such
            tokens itself, in rounds where that promises more. It changes
            no distribution, only the number of passes.
        min_confidence: in [0, 1]; a draft ends after a pass that gave a token a smaller q.

    Raises:
        InvalidParameterError: a value is outside its range.
    """

    gamma: int | Literal["auto"] = "auto"
    eta: float = 10.0
    dynamic_eta: bool = False
    alpha: float = 0.1
    mode: Mode = "paper"
    drafting: Drafting = "rag"
    lookup: bool = True
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        if self.gamma != "auto":
            _settle(
                self, "gamma", whole, "'auto' or a whole number of at least 1", lambda g: g >= 1
            )
        _settle(
            self,
            "eta",
            real,
            f"a number of at least 0 (0 is lossless) and at most {MAX_ETA:.0e}",
            lambda eta: 0 <= eta <= MAX_ETA,
        )
        _settle(self, "alpha", real, "within [0, 1]", lambda alpha: 0 <= alpha <= 1)
        _settle(self, "min_confidence", real, "within [0, 1]", lambda q: 0 <= q <= 1)
        for name in ("dynamic_eta", "lookup"):
            value = getattr(self, name)
            _require(isinstance(value, bool), name, value, "True or False")
        kinds = get_args(Drafting)
        _require(self.drafting in kinds, "drafting", self.drafting, "one of " + ", ".join(kinds))
        modes = get_args(Mode)
        _require(self.mode in modes, "mode", self.mode, "one of " + ", ".join(modes))

    @property
    def transfer_strength(self) -> float:
        """η as it is applied: 0 in ``exact`` mode."""
        return 0.0 if self.applied_mode == "exact" else self.eta

    @property
    def applied_mode(self) -> Mode:
        """The mode; ``exact`` for ``rest``, whose drafts have no distribution of their own."""
        return "exact" if self.drafting == "rest" else self.mode


def from_options(options: Mapping[str, Any]) -> tuple[SamplingParams, SpeculationConfig]:
    """Sort flat options, as the frameworks pass them, into the two dataclasses.

    Args:
        options: names of either dataclass's attributes, or ``max_tokens`` for
            ``max_new_tokens``; None leaves the default (but for ``seed``, where None is a value).

    Raises:
        InvalidParameterError: an unknown name, or a value outside its range.
    """
    given = {"max_new_tokens" if k == "max_tokens" else k: v for k, v in options.items()}
    given = {k: v for k, v in given.items() if v is not None or k == "seed"}
    sampling, speculation = (
        {field.name for field in fields(kind)} for kind in (SamplingParams, SpeculationConfig)
    )
    if unknown := given.keys() - sampling - speculation:
        raise InvalidParameterError(
            f"unknown option {min(unknown)!r}; known are "
            + ", ".join(sorted(sampling | speculation | {"max_tokens"}))
        )
    return (
        SamplingParams(**{k: v for k, v in given.items() if k in sampling}),
        SpeculationConfig(**{k: v for k, v in given.items() if k in speculation}),
    )
