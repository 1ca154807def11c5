"""The methods that are compared, and sweeps over their options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

from rapid_llm.config import Mode, Retriever, SpeculationConfig
from rapid_llm.errors import InvalidParameterError

_RETRIEVAL = ("retrieval_tokens", "chunk_tokens", "retriever", "embedder", "irrelevant")
_DRAFTS = ("eta", "mode", "dynamic_eta", "gamma")
METHODS: Mapping[str, tuple[str, ...]] = {
    "lc": (),
    "rag": _RETRIEVAL,
    "sd": (*_DRAFTS, *_RETRIEVAL),
    "rapid": (*_DRAFTS, *_RETRIEVAL),
    **dict.fromkeys(("streaming", "triforce", "rest"), ("gamma",)),
    "speculative-rag": _RETRIEVAL,
}
"""The methods, and the options that mean something for each."""

DRAFTER_ALONE = ("rag", "speculative-rag")
"""Methods whose answer the target does not write."""

_LOSSLESS: dict[str, Any] = {"eta": 0.0, "mode": "exact", "dynamic_eta": False}
_LABELS = {
    "gamma": "γ={}", "mode": "{}", "dynamic_eta": "dynamic", "retrieval_tokens": "{} retrieved",
    "chunk_tokens": "chunks of {}", "retriever": "{}", "embedder": "{}", "irrelevant": "irrelevant",
}  # fmt: skip


class RetrievalSpec(NamedTuple):
    """How the drafter's context is retrieved."""

    retrieval_tokens: int  # of long documents a 24th, if that is more
    chunk_tokens: int  # the longest chunk
    retriever: Retriever
    embedder: str | None  # None for bm25, which needs none
    irrelevant: bool  # from another item's document, the paper's stress test


class MethodSpec(NamedTuple):
    """A method with its options."""

    name: str  # unique in a run, such as "rapid η=10, irrelevant"
    base: str  # one of METHODS
    options: Mapping[str, Any]  # what means something for it, by name
    speculation: SpeculationConfig | None  # None where nothing is verified
    retrieval: RetrievalSpec | None  # None where nothing is retrieved


@dataclass(frozen=True)
class Sweep:
    """The values to run of each option; the first of each is the run's own and goes unnamed."""

    # auto follows costs that are each machine's own, so that scores would not reproduce.
    gamma: Sequence[int | Literal["auto"]] = (4,)
    eta: Sequence[float] = (SpeculationConfig.eta,)  # of rapid, always named; 0 is sd
    mode: Sequence[Mode] = (SpeculationConfig.mode,)  # of rapid; exact is sd
    retrieval_tokens: Sequence[int] = (4096,)
    chunk_tokens: Sequence[int] = (512,)
    retriever: Sequence[Retriever] = ("dense",)
    embedder: Sequence[str] = ("all-minilm-l6-v2",)
    irrelevant: bool = False  # run methods that retrieve a second time, with irrelevant chunks
    dynamic_eta: bool = False  # run rapid a second time, η following the retrieval's confidence

    @property
    def own(self) -> dict[str, Any]:
        """The values that go unnamed: one run has one of each."""
        swept = {name: value for name, value in vars(self).items() if name in _LABELS}
        return {name: value[0] for name, value in swept.items() if not isinstance(value, bool)}

    def methods(self, bases: Sequence[str]) -> tuple[MethodSpec, ...]:
        """Every method with every combination of the options that mean something for it, once.

        Raises InvalidParameterError where a name is unknown, or a value outside its range.
        """
        for name, given, known in (
            ("retriever", self.retriever, get_args(Retriever)),
            ("method", bases, METHODS),
        ):
            if unknown := set(given) - set(known):
                raise InvalidParameterError(
                    f"{name}={min(unknown)!r} is unknown; choose from {', '.join(known)}"
                )
        specs: dict[str, MethodSpec] = {}
        for base in bases:
            for values in product(*map(self._values, METHODS[base])):
                spec = self._spec(base, dict(zip(METHODS[base], values, strict=True)))
                specs.setdefault(spec.name, spec)
        return tuple(specs.values())

    def _values(self, option: str) -> Sequence[Any]:
        value = getattr(self, option)
        return ((False, True) if value else (False,)) if isinstance(value, bool) else value

    def _spec(self, base: str, options: dict[str, Any]) -> MethodSpec:
        speculation = retrieval = None
        if base == "sd" or not options.get("eta", True) or options.get("mode") == "exact":
            base, options = "sd", options | _LOSSLESS
        if "gamma" in options:  # what reads no passages is lossless, as published
            drafting: Any = "rag" if "retriever" in options else base
            drafts = _LOSSLESS | {name: options[name] for name in _DRAFTS if name in options}
            speculation = SpeculationConfig(**drafts, drafting=drafting)
        if "retriever" in options:
            if options["retriever"] == "bm25" and base != "speculative-rag":  # which clusters
                options["embedder"] = None
            retrieval = RetrievalSpec(**{name: options[name] for name in _RETRIEVAL})
        own = self.own | {"dynamic_eta": False, "irrelevant": False}
        if base == "sd":
            own["mode"] = "exact"  # it has no other
        parts = [f"rapid η={options['eta']:g}" if base == "rapid" else base]
        parts += [
            label.format(options[name])
            for name, label in _LABELS.items()
            if options.get(name, own[name]) not in (None, own[name])
        ]
        return MethodSpec(", ".join(parts), base, options, speculation, retrieval)
