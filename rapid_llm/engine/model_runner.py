"""A loaded model as a function: token ids and a cache in, logits out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from rapid_llm.config import Quantization
from rapid_llm.engine import attention
from rapid_llm.engine.cpu.device import CPU
from rapid_llm.engine.cuda.device import CUDA
from rapid_llm.engine.device import (
    Judge,
    Pass,
    ReplayedPass,
    TokenSampler,
    WeightKind,
    device_of,
    register,
)
from rapid_llm.engine.identity import ModelState
from rapid_llm.engine.kv_cache import KVCache, KVOrigin
from rapid_llm.engine.lean import LeanPass, has_fixed_rotary, is_lean
from rapid_llm.engine.transformers_pass import TransformersPass
from rapid_llm.errors import (
    InvalidParameterError,
    MissingDependencyError,
    ModelError,
    OutdatedKVError,
)

register("cpu", CPU())
register("cuda", CUDA())

SUPPORTED = frozenset(
    {
        "gemma3",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "olmo2",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
    }
)
"""``config.model_type`` of the architectures that the tests compare with their own forward."""

_T = TypeVar("_T")

ATTENTION = (attention.NAME, "sdpa", "flash_attention_2", "eager")

_locks: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()


def _lock_of(model: PreTrainedModel) -> threading.RLock:
    """One lock a model, however many decoders were built around it."""
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


class ModelRunner:
    """Runs a model over our cache: a lean forward pass where there is one, or its own.

    The model is what it is at each call: see :class:`rapid_llm.engine.identity.ModelState`, which
    says what is followed, and what its user must say by :meth:`RapidDecoder.clear_cache`.

    Args:
        model: a decoder-only transformers model.
        name: what errors and results call it.
        attn_implementation: ``rapid`` (ours), or one of transformers' own, which always runs
            the model's own forward pass.
        cuda_graphs: whether passes of few tokens are replayed from CUDA graphs: None where they
            can be (a lean pass, on Ampere or newer, with Triton), False nowhere. True insists:
            a pass that could not be captured when it was first needed is an error then, and not
            only slower.

    Raises:
        ModelError: the architecture, an adapter or the attention implementation is not supported.
            Calls raise it too, as adapters may be added later.
        InvalidParameterError: ``cuda_graphs=True`` where passes cannot be captured. Calls raise it
            where one could not be captured when it was first needed.
        MissingDependencyError: the attention implementation is not installed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        attn_implementation: str = attention.NAME,
        cuda_graphs: bool | None = None,
    ) -> None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in SUPPORTED:
            raise ModelError(
                f"{name}: architecture {model_type!r} ({type(model).__name__}) is not supported, "
                f"because its cache could not be rolled back or was never checked; "
                f"supported are {', '.join(sorted(SUPPORTED))}"
            )
        if attn_implementation not in ATTENTION:
            raise ModelError(
                f"{name}: attn_implementation={attn_implementation!r} is unknown; "
                f"choose one of {', '.join(ATTENTION)}"
            )
        if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
            raise MissingDependencyError(
                f"{name}: attn_implementation='flash_attention_2' needs the package flash-attn and "
                "a CUDA device; install it, or use 'rapid' or 'sdpa'"
            )
        self.model = model
        self.name = name
        self.attn_implementation = attn_implementation
        self.config = model.config.get_text_config()
        if getattr(self.config, "use_bidirectional_attention", None):
            raise ModelError(f"{name} attends in both directions; a causal model is needed")
        self.cuda_graphs = cuda_graphs
        self._lock = _lock_of(model)
        with self._lock:
            self.state = ModelState(model)
            self._choose()
        if cuda_graphs and self._replayed is None:
            raise InvalidParameterError(
                f"cuda_graphs=True, but passes of {name} on {self.device} cannot be captured: that "
                "takes a model of the Llama family with our attention, Triton, and an Ampere GPU "
                "or a newer one; leave cuda_graphs out to capture where it can be done"
            )

    def _choose(self) -> None:
        """Passes for the model as it is now, the fastest first; the last serves whatever comes."""
        self._chosen: int | None = None
        self._require_layers_in_order()
        self._require_tokens_alike()
        self._passes: list[Pass] = []
        self._lean = self.attn_implementation == attention.NAME and is_lean(self.state)
        # What a scaled rotary embedding does to itself in a pass is for :meth:`absorb`.
        self._leaves_itself = self._lean and has_fixed_rotary(self.model)
        if self._lean:
            own = device_of(self.device).passes(self.model, self.state, self.cuda_graphs)
            self._passes += [*own, LeanPass(self.model)]
        self._passes.append(TransformersPass(self.model, self.state, self.attn_implementation))
        replayed = (each for each in self._passes if isinstance(each, ReplayedPass))
        self._replayed: ReplayedPass | None = next(replayed, None)
        self._chosen = self.state.number

    def _follow(self) -> None:
        """What was done to the model since the last call; under its lock."""
        if self.state.look() != self._chosen:
            self._choose()

    def _require_layers_in_order(self) -> None:
        """Refuses layers that were taken out or put in without telling them and the config."""
        layers: Any = self.model.get_decoder().layers
        places = [getattr(layer.self_attn, "layer_idx", i) for i, layer in enumerate(layers)]
        if places != list(range(self.config.num_hidden_layers)):
            raise ModelError(
                f"{self.name}: its layers keep their KV at {places}, but its config promises "
                f"{self.config.num_hidden_layers} layers, from 0 on; set config.num_hidden_layers, "
                "and layer_idx of each layer's self_attn"
            )

    def _require_tokens_alike(self) -> None:
        """Refuses what makes of a token something else where a sequence is read in parts."""
        adapters = getattr(self.model, "peft_config", None) or {}
        active: Any = getattr(self.model, "active_adapters", ())
        if not adapters or getattr(self.model, "_adapters_disabled", False):
            return
        if callable(active):  # transformers' own, which knows no adapter that PEFT has put in
            active = active() if getattr(self.model, "_hf_peft_config_loaded", False) else adapters
        for name in active:
            config = adapters[name]
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            if (
                config.is_prompt_learning
                or config.is_adaption_prompt
                or kind == "XLORA"
                or getattr(config, "alora_invocation_tokens", None)
            ):
                raise ModelError(
                    f"{self.name}: the adapter {name!r} ({kind}) is not supported, because it adds "
                    "to a whole sequence what reading it in parts does not; use an adapter of the "
                    "weights, such as LoRA, or disable it"
                )

    @property
    def lean(self) -> bool:
        """Whether our own passes compute what the model does, as it is now."""
        with self._lock:
            self._follow()
            return self._lean

    @property
    def lock(self) -> threading.RLock:
        """Held by a pass: whoever holds it has the model alone."""
        return self._lock

    @property
    def device(self) -> torch.device:
        """Where token ids go in (a model may be spread over several devices)."""
        return self.model.get_input_embeddings().weight.device

    def tensor(self, tokens: Sequence[int]) -> Tensor:
        """Int64 ``[n]`` where token ids go in; the host does not wait for the device."""
        host = torch.tensor(tokens, dtype=torch.long, device="cpu")
        return device_of(self.device).upload(host, self.device)

    @property
    def vocab_size(self) -> int:
        """Width of the logits; may be padded beyond the tokenizer's vocabulary."""
        head = self.model.get_output_embeddings()
        return int(getattr(head, "out_features", self.config.vocab_size))

    @property
    def context_window(self) -> int:
        """Positions that the model was made for, YaRN scaling included."""
        window = int(self.config.max_position_embeddings)
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "yarn":
            original = rope.get("original_max_position_embeddings") or window
            window = max(window, int(original * rope["factor"]))
        return window

    @property
    def slides(self) -> bool:
        """Whether some layer attends through a sliding window only."""
        types = getattr(self.config, "layer_types", None)
        if types is not None:
            return "sliding_attention" in types
        return getattr(self.config, "sliding_window", None) is not None

    @property
    def copyable(self) -> bool:
        """Whether a copy of the model would compute what it does, as it is now."""
        with self._lock:
            self._follow()
            return self.state.copyable

    @property
    def passes(self) -> Sequence[Pass]:
        """What can run the model as it is now, the fastest first."""
        with self._lock:
            self._follow()
            return tuple(self._passes)

    @property
    def switches(self) -> list[int]:
        """Lengths beyond which the rotary embedding turns every position of a sequence otherwise.

        Longrope has one: KV of a sequence up to it is of no use beyond.
        """
        return [
            int(rope["original_max_position_embeddings"])
            for rope in self._ropes()
            if rope.get("rope_type") == "longrope"
        ]

    def _ropes(self) -> list[dict[str, Any]]:
        """The rotary embeddings' parameters: one set, or one for each type of layer."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        nested = [each for each in rope.values() if isinstance(each, dict) and "rope_type" in each]
        return nested or [rope]

    def origin(self, length: int) -> KVOrigin:
        """What reads a sequence of so many tokens now: KV that another one read is of no use.

        Raises:
            ModelError: the rotary embedding changes with every token at such lengths, or an adapter
                is not supported.
        """
        with self._lock:
            self._follow()
            return KVOrigin(self.state.number, self._scale(length))

    def _scale(self, length: int) -> int:
        window = int(self.config.max_position_embeddings)
        if length > window and any(rope.get("rope_type") == "dynamic" for rope in self._ropes()):
            raise ModelError(
                f"{self.name} scales its rotary embedding dynamically: beyond {window} tokens "
                f"(here {length}) each new one changes all before it; stay below, or load the "
                "model with rope_type 'yarn'"
            )
        return sum(length > switch for switch in self.switches)

    def kept_origin(self, length: int) -> KVOrigin | None:
        """As :meth:`reader`, for KV that is kept between calls.

        Looks at the weights more closely. None where KV must not be kept: what the model computes
        depends on code that somebody has put in, and on what that code may read.
        """
        with self._lock:
            self.state.take_samples()
            origin = self.origin(length)
            return origin if self.state.traceable else None

    def require(self, kind: WeightKind) -> None:
        """Raises InvalidParameterError where this model cannot have weights of so few bits."""
        quantizers = device_of(self.device).quantizers
        if kind not in quantizers:
            others = " or ".join(map(repr, sorted(quantizers)))
            raise InvalidParameterError(
                f"drafter_quantization={kind!r} does not serve on {self.device}, where {self.name} "
                f"is: take {others or 'None'}, or load a drafter quantized for that device "
                "(bitsandbytes or torchao, through transformers' quantization_config), pass it as "
                "drafter= and leave drafter_quantization out"
            )
        quantizers[kind].require(self.model, self.name, self.passes)

    def drafter_weights(
        self, quantization: Quantization | None, *, auto: bool
    ) -> WeightKind | None:
        """The kind of weights to draft with, None for the model's own.

        Args:
            quantization: what was asked for.
            auto: whether ``auto`` takes what is cheapest here.

        Raises:
            InvalidParameterError: it is unknown, or this model cannot have such weights.
        """
        if quantization not in (None, *get_args(Quantization)):
            raise InvalidParameterError(
                f"drafter_quantization={quantization!r} is unknown; "
                "use 'auto', 'int8', 'int4' or None"
            )
        if quantization == "auto":
            return self.cheapest if auto else None
        if quantization is not None:
            self.require(quantization)
        return quantization

    @property
    def cheapest(self) -> WeightKind | None:
        """The kind of weights with which a draft step takes least, None for its own."""
        quantizers, passes = device_of(self.device).quantizers, self.passes
        return next((k for k, each in quantizers.items() if each.pays(self.model, passes)), None)

    def quantized(self, kind: WeightKind) -> PreTrainedModel:
        """The model over weights of few bits, made for what it is now and freed with it."""
        quantizer = device_of(self.device).quantizers[kind]
        return quantizer.copy(self.model, self.state, self.passes)

    def capacity_for(self, tokens: int) -> int:
        """Tokens that a cache for so many is best made for."""
        return device_of(self.device).capacity_for(tokens)

    @property
    def prefill_sizes(self) -> tuple[int, ...]:
        """Tokens that passes of a prefill read, descending: see :mod:`rapid_llm.engine.chunks`."""
        device = device_of(self.device)
        return device.prefill_chunk, *device.prefill_pieces

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        device_of(self.device).synchronize(self.device)

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for ``capacity`` tokens; its memory is taken at the first pass."""
        return KVCache(self.config.num_hidden_layers, capacity)

    def __call__(self, tokens: Tensor, cache: KVCache, keep_logits: int) -> Tensor:
        """Append tokens to the cache.

        Args:
            tokens: int64 ``[n]`` on any device; they follow what the cache holds.
            cache: has room for n more tokens; left as it was if the pass fails.
            keep_logits: for how many of the last positions logits are computed, 1 to n.

        Returns:
            float32 ``[keep_logits, vocab_size]``.

        Raises:
            OutdatedKVError: what the cache holds is not what the model would compute now.
            ModelError: an adapter was added that is not supported.
        """
        ids = tokens.to(self.device, non_blocking=True)
        length = max(cache.expected, cache.length + cache.position_offset + ids.shape[0])

        with self._lock:
            replayed, logits = self._replayed, None
            if replayed is not None and replayed.serves(ids, cache, keep_logits):
                logits = self._ahead(cache, partial(replayed, ids, ids, cache, keep_logits))
            if logits is None:
                with self._reading(cache, length):
                    positions = self._positions(ids, cache, length)
                    run = next(p for p in self._passes if p.serves(ids, cache, keep_logits))
                    logits = run(ids, positions, cache, keep_logits)
            return logits.float()

    def draft(
        self,
        pending: Tensor,
        steps: int,
        cache: KVCache,
        choice: TokenSampler,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor] | None:
        """Draft steps that feed one another on the device.

        See :class:`rapid_llm.engine.cuda.draft_loop.DraftLoop`, for the errors :meth:`__call__`.
        None, and nothing is read, where the host must take part.
        """

        def launch(replayed: ReplayedPass) -> tuple[Tensor, Tensor]:
            return replayed.loop(choice)(pending, steps, cache, generator)

        return self._replay(pending.shape[0] + steps - 1, cache, generator, launch)

    def verify(
        self,
        tokens: Tensor,
        q: Tensor,
        eta: Tensor | None,
        cache: KVCache,
        judge: Judge,
        generator: torch.Generator,
    ) -> Tensor | None:
        """A verdict on a draft that is read: pass and judge in one launch.

        See :class:`rapid_llm.engine.cuda.verification.Verification`, for the errors
        :meth:`__call__`. None, and nothing is read, where the host must take part.
        """
        n = tokens.shape[0]

        def launch(replayed: ReplayedPass) -> Tensor | None:
            if not replayed.serves(tokens, cache, n):
                return None
            return replayed.verification(judge)(tokens, q, eta, cache, generator)

        return self._replay(n, cache, generator, launch)

    def _replay(
        self,
        tokens: int,
        cache: KVCache,
        generator: torch.Generator,
        launch: Callable[[ReplayedPass], _T | None],
    ) -> _T | None:
        """What is launched by the replayed pass of the model as it is now, if it has one.

        Args:
            tokens: that are appended to the cache.
            cache, generator: left as they were where nothing is launched.
            launch: to be called again if the model is no longer what was captured.
        """
        with self._lock:
            replayed = self._replayed
            if replayed is None:
                return None
            drawn = generator.get_state()
            result = self._ahead(cache, partial(launch, replayed))
            if result is None:
                generator.set_state(drawn)
                with self._reading(cache, cache.length + cache.position_offset + tokens):
                    if self._replayed is not None:
                        result = launch(self._replayed)
            return result

    def _ahead(self, cache: KVCache, launch: Callable[[], _T | None]) -> _T | None:
        """What a captured pass gives; the model is looked at while the device works.

        None, and nothing was appended, if the model is no longer what was captured.
        """
        start = cache.length
        if cache.origin != KVOrigin(self.state.number, 0):
            return None
        try:
            with torch.autocast(self.device.type, enabled=False):  # a capture is for all that come
                result = launch()
            if self.state.look() == self._chosen:
                return result
        except BaseException:
            cache.rollback(start)
            raise
        cache.rollback(start)
        return None

    @contextmanager
    def _reading(self, cache: KVCache, length: int) -> Iterator[None]:
        """A pass of the model as it is now, over a sequence of so many tokens.

        In the dtypes of its weights, whatever the caller casts to: KV outlives the call.
        """
        start = cache.length
        with self._lock:
            origin = self.origin(length)
            if start == 0:
                cache.origin = origin
            elif cache.origin not in (None, origin):
                raise OutdatedKVError(
                    f"{self.name} has changed since it read the first "
                    f"{start + cache.position_offset} tokens; read them again with the weights and "
                    "the adapter that it has now"
                )
            try:
                with torch.autocast(self.device.type, enabled=False):
                    yield
            except BaseException:
                cache.rollback(start)
                raise
            finally:
                if not self._leaves_itself:
                    self.state.absorb()

    def _positions(self, ids: Tensor, cache: KVCache, length: int) -> Tensor:
        """Of the tokens; the sequence's last follows where a rotary embedding goes by that."""
        first = cache.length + cache.position_offset
        end = first + ids.shape[0]
        positions = torch.arange(first, end, device=self.device)
        if self._scale(length) == self._scale(end):
            return positions
        return torch.cat([positions, positions.new_tensor([length - 1])])
