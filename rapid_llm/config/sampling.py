"""Sampling options: how tokens are drawn, and what ends an answer."""

# No ``from __future__ import annotations``: the options declared in annotations are read at run
# time.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from re import Pattern
from typing import Annotated, Any, ClassVar

from rapid_llm.grammars import canonical
from rapid_llm.options import Option, check

MIN_TEMPERATURE = 1e-5
"""Temperature below which decoding is greedy: logits divided by it could overflow float32."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options; the same logits processors act on target (p) and drafter (q).

    The settings of the answering model's ``generation_config`` that change greedy decoding apply
    too: penalties, suppressed and forced tokens, minimum length, stop strings. Its sampling
    settings, maximum length and time limit do not. Numbers may be Python numbers, NumPy scalars or
    torch scalars.

    Raises:
        InvalidParameterError: a value is outside its range.
    """

    title: ClassVar = "Sampling"

    temperature: Annotated[
        float,
        Option(
            "Softmax temperature; 0 decodes greedily.",
            "a number of at least 0 (0 is greedy)",
            lambda t: t >= 0,
        ),
    ] = 0.0
    top_p: Annotated[
        float,
        Option(
            "Nucleus mass in (0, 1]; 1 keeps every token.",
            "in (0, 1] (1 keeps every token)",
            lambda p: 0 < p <= 1,
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        Option(
            "Number of most likely tokens to keep; 0 keeps every token.",
            "a whole number of at least 0 (0 keeps every token)",
            lambda k: k >= 0,
        ),
    ] = 0
    repetition_penalty: Annotated[
        float | None,
        Option(
            "Penalty on tokens seen before (Keskar et al. 2019); 1 is none; by default the value "
            "in the model's generation_config.",
            "a number above 0 (1 is none)",
            lambda r: r > 0,
        ),
    ] = None
    max_new_tokens: Annotated[
        int,
        Option(
            "Maximum length of the answer in tokens; less where the context window has less room.",
            "a whole number of at least 1",
            lambda n: n >= 1,
            aliases=("max_tokens",),
        ),
    ] = 256
    stop: Annotated[
        Sequence[str],
        Option("Strings that end the answer, left out of it.", "a list of non-empty strings"),
    ] = ()
    seed: Annotated[
        int | None,
        Option(
            "Random seed, which makes an answer repeatable on one device; None for a random seed.",
            "None or a whole number from 0 to 2**63 - 1",
            lambda seed: 0 <= seed < 2**63,
        ),
    ] = 0
    ignore_eos: Annotated[
        bool, Option("Whether to go on after an end-of-sequence token (for measurements).")
    ] = False
    constraint: Annotated[
        Mapping[str, Any] | Sequence[str] | str | Pattern[str] | type | None,
        Option(
            "Form of the answer: a JSON schema (or a pydantic class), json for any JSON object, a "
            "regular expression, a list of choices, or a Lark or GBNF grammar. A mapping with the "
            "one key json, regex, choice or grammar says which.",
            "one of these forms or None",
            convert=canonical,
        ),
    ] = None
    timeout: Annotated[
        float | None,
        Option(
            "Time limit for prefill and generation in seconds, after which the call fails; by "
            "default none.",
            "None or a number of seconds above 0",
            lambda seconds: seconds > 0,
            metavar="SECONDS",
        ),
    ] = None

    def __post_init__(self) -> None:
        check(self)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken, without sampling."""
        return self.temperature < MIN_TEMPERATURE
