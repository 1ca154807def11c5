"""What a caller can choose for one generation: how to sample, and how to speculate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any, Literal, get_args

from rapid_llm.errors import InvalidParameterError

Mode = Literal["exact", "augmented", "paper"]
Drafting = Literal["rag", "streaming", "triforce", "rest"]
Quantization = Literal["auto", "int8", "int4"]


def _require(ok: bool, name: str, value: object, limit: str) -> None:
    if not ok:
        raise InvalidParameterError(f"{name}={value!r} is not allowed: {name} must be {limit}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. The same processors act on target (p) and drafter (q).

    Attributes:
        temperature: 0 decodes greedily; above 0 divides the logits.
        top_p: nucleus mass in (0, 1]; 1 keeps everything.
        top_k: number of most likely tokens kept; 0 keeps everything.
        repetition_penalty: above 0; 1 is none (Keskar et al. 2019, as in transformers).
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
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128
    stop: Sequence[str] = ()
    seed: int | None = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        t, p = self.temperature, self.top_p
        _require(_is_real(t) and t >= 0, "temperature", t, "a number of at least 0 (0 is greedy)")
        _require(_is_real(p) and 0 < p <= 1, "top_p", p, "in (0, 1] (1 keeps every token)")
        _require(
            _is_int(self.top_k) and self.top_k >= 0,
            "top_k",
            self.top_k,
            "a whole number of at least 0 (0 keeps every token)",
        )
        _require(
            _is_real(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            self.repetition_penalty,
            "a number above 0 (1 is none)",
        )
        _require(
            _is_int(self.max_new_tokens) and self.max_new_tokens >= 1,
            "max_new_tokens",
            self.max_new_tokens,
            "a whole number of at least 1",
        )
        _require(
            all(isinstance(s, str) and s for s in stop), "stop", stop, "a list of non-empty strings"
        )
        _require(
            self.seed is None or (_is_int(self.seed) and 0 <= self.seed < 2**63),
            "seed",
            self.seed,
            "None or a whole number from 0 to 2**63 - 1",
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class SpeculationConfig:
    """How drafts are made and judged (RAPID, arXiv 2502.20330; see ``speculation.acceptance``).

    Attributes:
        gamma: tokens drafted a round (γ), at least 1 (the paper uses 10); or ``auto``: each round
            takes what the measured costs and the acceptance so far make fastest, 0 included. The
            costs are measured once for each model and context length and then kept, so that a
            decoder repeats itself; another process may measure, draft and round differently.
        eta: strength of the knowledge transfer (η), at least 0. The paper uses 5 to 20 for
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
        _require(
            self.gamma == "auto" or (_is_int(self.gamma) and self.gamma >= 1),
            "gamma",
            self.gamma,
            "'auto' or a whole number of at least 1",
        )
        _require(
            _is_real(self.eta) and self.eta >= 0,
            "eta",
            self.eta,
            "a number of at least 0 (0 is lossless)",
        )
        _require(
            _is_real(self.alpha) and 0 <= self.alpha <= 1, "alpha", self.alpha, "within [0, 1]"
        )
        for name in ("dynamic_eta", "lookup"):
            value = getattr(self, name)
            _require(isinstance(value, bool), name, value, "True or False")
        confidence = self.min_confidence
        _require(
            _is_real(confidence) and 0 <= confidence <= 1,
            "min_confidence",
            confidence,
            "within [0, 1]",
        )
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
