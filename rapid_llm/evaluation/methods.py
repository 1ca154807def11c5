"""The methods that are compared, and sweeps over their options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal, get_args

from rapid_llm.config import Mode, Retriever, SpeculationConfig
from rapid_llm.errors import InvalidParameterError

Base = Literal["lc", "rag", "sd", "rapid", "streaming", "triforce", "rest", "speculative-rag"]
BASES: tuple[Base, ...] = get_args(Base)

DRAFTER_ALONE: tuple[Base, ...] = ("rag", "speculative-rag")
"""Methods whose answer the target does not write."""

GAMMA = 4
"""The default γ. ``auto`` follows costs that are each machine's own, so that scores would not
reproduce; speeds are those of this γ."""


@dataclass(frozen=True)
class RetrievalSpec:
    """How the drafter's context is retrieved.

    Attributes:
        context_tokens: its tokens; of long documents a 24th, if that is more.
        chunk_tokens: the longest chunk.
        retriever: ``dense``, ``bm25`` or ``hybrid``.
        embedder: its name; None for ``bm25``, which needs none.
        irrelevant: from another item's document, the paper's stress test.
    """

    context_tokens: int
    chunk_tokens: int
    retriever: Retriever
    embedder: str | None
    irrelevant: bool = False


@dataclass(frozen=True)
class MethodSpec:
    """A method with its options.

    Attributes:
        name: readable, and unique in a run, such as ``rapid η=10, irrelevant``.
        base: the method.
        speculation: None where nothing is verified.
        retrieval: None where nothing is retrieved.
    """

    name: str
    base: Base
    speculation: SpeculationConfig | None = None
    retrieval: RetrievalSpec | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What means something for this method, by name."""
        options: dict[str, Any] = {}
        if self.speculation is not None:
            options["gamma"] = self.speculation.gamma
            if self.base in ("sd", "rapid"):
                options["eta"] = self.speculation.transfer_strength
                options["mode"] = self.speculation.mode
                options["dynamic_eta"] = self.speculation.dynamic_eta
        return options | (asdict(self.retrieval) if self.retrieval else {})


@dataclass(frozen=True)
class Sweep:
    """The values to run of each option; the first of each is the run's own and goes unnamed.

    Attributes:
        gamma: γ, whole numbers or ``auto``.
        eta: η of ``rapid``, always named; 0 is ``sd``.
        mode: of ``rapid``; ``exact`` is ``sd``.
        context_tokens, chunk_tokens, retriever, embedder: see :class:`RetrievalSpec`.
        irrelevant: run methods that retrieve a second time, with irrelevant chunks.
        dynamic_eta: run ``rapid`` a second time, with η following the retrieval's confidence.
    """

    gamma: Sequence[int | Literal["auto"]] = (GAMMA,)
    eta: Sequence[float] = (SpeculationConfig.eta,)
    mode: Sequence[Mode] = (SpeculationConfig.mode,)
    context_tokens: Sequence[int] = (4096,)
    chunk_tokens: Sequence[int] = (512,)
    retriever: Sequence[Retriever] = ("dense",)
    embedder: Sequence[str] = ("all-minilm-l6-v2",)
    irrelevant: bool = False
    dynamic_eta: bool = False

    @property
    def own(self) -> dict[str, Any]:
        """The values that go unnamed: one run has one of each."""
        return {
            "gamma": self.gamma[0],
            "mode": self.mode[0],
            "context_tokens": self.context_tokens[0],
            "chunk_tokens": self.chunk_tokens[0],
            "retriever": self.retriever[0],
            "embedder": self.embedder[0],
        }

    def methods(self, bases: Sequence[str]) -> tuple[MethodSpec, ...]:
        """Every method with every combination of the options that mean something for it, once.

        Raises:
            InvalidParameterError: a method or a retriever is unknown, or a value is outside its
                range.
        """
        if unknown := set(self.retriever) - set(get_args(Retriever)):
            raise InvalidParameterError(
                f"retriever={min(unknown)!r} is unknown; use {', '.join(get_args(Retriever))}"
            )
        specs: dict[str, MethodSpec] = {}
        for base in bases:
            if base not in BASES:
                raise InvalidParameterError(
                    f"method={base!r} is unknown; choose from {', '.join(BASES)}"
                )
            for spec in self._specs(base):
                specs.setdefault(spec.name, spec)
        return tuple(specs.values())

    def _specs(self, base: Base) -> Iterator[MethodSpec]:
        if base == "lc":
            yield MethodSpec(base, base)
        elif base in DRAFTER_ALONE:
            for retrieval in self._retrievals(embeds=base == "speculative-rag"):
                yield self._named(base, None, retrieval)
        elif base in ("streaming", "triforce", "rest"):
            for gamma in self.gamma:  # lossless, as published
                yield self._named(base, replace(_EXACT, gamma=gamma, drafting=base), None)
        else:
            configs = self._configs() if base == "rapid" else [_EXACT]
            for config, gamma, retrieval in product(configs, self.gamma, self._retrievals()):
                effective: Base = "rapid" if config.transfer_strength else "sd"
                yield self._named(effective, replace(config, gamma=gamma), retrieval)

    def _configs(self) -> Iterator[SpeculationConfig]:
        for eta, mode in product(self.eta, self.mode):
            config = SpeculationConfig(eta=eta, mode=mode)
            if not config.transfer_strength:
                yield _EXACT
                continue
            yield config
            if self.dynamic_eta:
                yield replace(config, dynamic_eta=True)

    def _retrievals(self, embeds: bool = False) -> Iterator[RetrievalSpec]:
        """``embeds``: the method itself needs the embedder, whatever the retriever."""
        for tokens, chunk, retriever, embedder in product(
            self.context_tokens, self.chunk_tokens, self.retriever, self.embedder
        ):
            needed = embedder if embeds or retriever != "bm25" else None
            for irrelevant in (False, True) if self.irrelevant else (False,):
                yield RetrievalSpec(tokens, chunk, retriever, needed, irrelevant)

    def _named(
        self, base: Base, config: SpeculationConfig | None, retrieval: RetrievalSpec | None
    ) -> MethodSpec:
        options = MethodSpec("", base, config, retrieval).options
        own = self.own | {"dynamic_eta": False, "irrelevant": False}
        if base == "sd":
            own["mode"] = options["mode"]  # it has no other
        parts = [f"rapid η={options['eta']:g}" if base == "rapid" else base]
        parts += [
            label.format(options[name])
            for name, label in _LABELS.items()
            if options.get(name, own[name]) not in (None, own[name])
        ]
        return MethodSpec(", ".join(parts), base, config, retrieval)


_EXACT = SpeculationConfig(eta=0.0, mode="exact")
_LABELS = {
    "gamma": "γ={}",
    "mode": "{}",
    "dynamic_eta": "dynamic",
    "context_tokens": "{} retrieved",
    "chunk_tokens": "chunks of {}",
    "retriever": "{}",
    "embedder": "{}",
    "irrelevant": "irrelevant",
}
