"""Speculation options: how drafts are made and verified."""

# No ``from __future__ import annotations``: the options declared in annotations are read at run
# time.

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from rapid_llm.options import Option, check

Mode = Literal["exact", "augmented", "paper"]
Drafting = Literal["rag", "streaming", "triforce", "rest"]

MAX_ETA = 1e30
"""Largest η: above it the transfer could overflow float32."""


@dataclass(frozen=True)
class SpeculationConfig:
    """Speculation options: how drafts are made and verified (RAPID, arXiv 2502.20330).

    See :mod:`rapid_llm.speculation.acceptance` for the formulas.

    Raises:
        InvalidParameterError: a value is outside its range.
    """

    title: ClassVar = "Speculation"

    gamma: Annotated[
        int | Literal["auto"],
        Option(
            "Number of tokens drafted per round (γ; the paper uses 10). auto takes the fastest, "
            "given the measured costs and the acceptance so far; 0 too, unless drafts transfer "
            "knowledge.",
            "'auto' or a whole number of at least 1",
            lambda gamma: gamma >= 1,
        ),
    ] = "auto"
    eta: Annotated[
        float,
        Option(
            "Strength of the knowledge transfer (η); 0 is lossless. The paper uses 5 to 20 for "
            "self-speculation, 40 to 50 for a larger drafter. Mode exact ignores it.",
            f"a number of at least 0 (0 is lossless) and at most {MAX_ETA:.0e}",
            lambda eta: 0 <= eta <= MAX_ETA,
        ),
    ] = 10.0
    dynamic_eta: Annotated[
        bool,
        Option(
            "Whether η follows the retrieval's confidence and fades: token t gets η · confidence · "
            "2^(-t / 32). This rule is ours, not the paper's."
        ),
    ] = False
    alpha: Annotated[
        float,
        Option(
            "Tail protection (α): tokens with q < alpha * max(q) get no transfer.",
            "within [0, 1]",
            lambda alpha: 0 <= alpha <= 1,
        ),
    ] = 0.1
    mode: Annotated[
        Mode,
        Option(
            "Distribution of the answer: exact is the target's own, augmented the enriched one, "
            "paper follows the published rule, which is neither."
        ),
    ] = "paper"
    drafting: Annotated[
        Drafting,
        Option(
            "Drafting method: rag is the drafter over the retrieved context. For comparison: "
            "streaming and triforce, the target over a part of its own KV; rest, lookup in the "
            "target's prompt, which is always exact."
        ),
    ] = "rag"
    lookup: Annotated[
        bool,
        Option(
            "Whether to use prompt lookup: tokens that followed the same n-gram elsewhere in the "
            "prompts are verified in one pass. It changes no distribution."
        ),
    ] = True
    min_confidence: Annotated[
        float,
        Option(
            "Draft probability of a token below which the draft ends, in [0, 1].",
            "within [0, 1]",
            lambda q: 0 <= q <= 1,
        ),
    ] = 0.0

    def __post_init__(self) -> None:
        check(self)

    @property
    def transfer_strength(self) -> float:
        """η in effect: 0 in mode ``exact``."""
        return 0.0 if self.applied_mode == "exact" else self.eta

    @property
    def applied_mode(self) -> Mode:
        """Mode in effect: ``exact`` for ``rest``, whose drafts have no distribution of their own.

        For any other drafting method it is ``mode``.
        """
        return "exact" if self.drafting == "rest" else self.mode
