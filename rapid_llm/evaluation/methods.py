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
"""The methods, and the options that apply to each."""

DRAFTER_ALONE = ("rag", "speculative-rag")
"""Methods in which the drafter writes the answer alone."""

_LOSSLESS: dict[str, Any] = {"eta": 0.0, "mode": "exact", "dynamic_eta": False}
_LABELS = {
    "gamma": "γ={}", "mode": "{}", "dynamic_eta": "dynamic", "retrieval_tokens": "{} retrieved",
    "chunk_tokens": "chunks of {}", "retriever": "{}", "embedder": "{}", "irrelevant": "irrelevant",
}  # fmt: skip


class RetrievalSpec(NamedTuple):
    """Options of the retrieval of the drafter's context."""

    retrieval_tokens: int  # retrieval budget, or a 24th of a longer document
    chunk_tokens: int  # maximum length of a chunk
    retriever: Retriever
    embedder: str | None  # embedding model; None for bm25
    irrelevant: bool  # whether to retrieve from another item's document, as the paper's stress test


class MethodSpec(NamedTuple):
    """A method with its options."""

    name: str  # name that is unique in a run, such as "rapid η=10, irrelevant"
    base: str  # key of METHODS
    options: Mapping[str, Any]  # options that apply to the method, by name
    speculation: SpeculationConfig | None  # speculation options; None without verification
    retrieval: RetrievalSpec | None  # retrieval options; None without retrieval


@dataclass(frozen=True)
class Sweep:
    """Values of each option to run; the first of each is the default, left out of method names."""

    # auto depends on costs measured on each machine, so that scores would not reproduce.
    gamma: Sequence[int | Literal["auto"]] = (4,)
    eta: Sequence[float] = (SpeculationConfig.eta,)  # η of rapid, always named; 0 is sd
    mode: Sequence[Mode] = (SpeculationConfig.mode,)  # mode of rapid; exact is sd
    retrieval_tokens: Sequence[int] = (4096,)
    chunk_tokens: Sequence[int] = (512,)
    retriever: Sequence[Retriever] = ("dense",)
    embedder: Sequence[str] = ("all-minilm-l6-v2",)
    irrelevant: bool = False  # whether to also run with irrelevant chunks
    dynamic_eta: bool = False  # whether to also run rapid with a dynamic η

    @property
    def own(self) -> dict[str, Any]:
        """Default values of the swept options, which method names leave out."""
        swept = {name: value for name, value in vars(self).items() if name in _LABELS}
        return {name: value[0] for name, value in swept.items() if not isinstance(value, bool)}

    def methods(self, bases: Sequence[str]) -> tuple[MethodSpec, ...]:
        """Every method of :data:`METHODS` with every combination of its options, once.

        Raises:
            InvalidParameterError: a name is unknown, or a value is outside its range.
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
        if "gamma" in options:  # methods without retrieval are lossless, as published
            drafting: Any = "rag" if "retriever" in options else base
            drafts = _LOSSLESS | {name: options[name] for name in _DRAFTS if name in options}
            speculation = SpeculationConfig(**drafts, drafting=drafting)
        if "retriever" in options:
            # Speculative RAG clusters embeddings, whatever the retriever.
            if options["retriever"] == "bm25" and base != "speculative-rag":
                options["embedder"] = None
            retrieval = RetrievalSpec(**{name: options[name] for name in _RETRIEVAL})
        own = self.own | {"dynamic_eta": False, "irrelevant": False}
        if base == "sd":
            own["mode"] = "exact"  # the only mode of sd
        parts = [f"rapid η={options['eta']:g}" if base == "rapid" else base]
        parts += [
            label.format(options[name])
            for name, label in _LABELS.items()
            if options.get(name, own[name]) not in (None, own[name])
        ]
        return MethodSpec(", ".join(parts), base, options, speculation, retrieval)
