"""Model runner: runs a loaded model over a KV cache, by the fastest pass that is exact for it."""

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
    NextMask,
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
"""Supported values of ``config.model_type``: those that the tests compare with transformers."""

_T = TypeVar("_T")

ATTENTION = (attention.NAME, "sdpa", "flash_attention_2", "eager")

_locks: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()


def _lock_of(model: PreTrainedModel) -> threading.RLock:
    """The lock of a model, shared by all runners of it."""
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


class ModelRunner:
    """Runs a model over our KV cache, by our own passes where they are exact, or by its forward.

    Changes to the model take effect at the next call, see
    :class:`rapid_llm.engine.identity.ModelState`. After edits that are not detected the user calls
    :meth:`RapidDecoder.clear_cache`.

    Args:
        model: decoder-only transformers model.
        name: name of the model in errors and results.
        attn_implementation: ``rapid`` (this library's), or one of transformers' own, with which the
            model's own forward always runs.
        cuda_graphs: whether passes of few tokens are replayed from CUDA graphs. None: where
            possible (lean models on Ampere or newer, with Triton); False: never; True: where it is
            not possible, or a capture fails, an error is raised instead of running more slowly.

    Raises:
        ModelError: the architecture, an adapter or the attention implementation is not supported.
            Calls raise it too, because adapters may be added later.
        InvalidParameterError: ``cuda_graphs=True`` where passes cannot be captured. Calls raise it
            too, where a capture fails.
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
            self._select_passes()
        if cuda_graphs and self._replayed is None:
            raise InvalidParameterError(
                f"cuda_graphs=True, but passes of {name} on {self.device} cannot be captured: that "
                "takes a model of the Llama family with our attention, Triton, and an Ampere GPU "
                "or a newer one; leave cuda_graphs out to capture where it can be done"
            )

    def _select_passes(self) -> None:
        """Make the passes for the model's current state, the fastest first; the last serves all."""
        self._chosen: int | None = None
        self._require_layers_in_order()
        self._require_tokens_alike()
        self._passes: list[Pass] = []
        self._lean = self.attn_implementation == attention.NAME and is_lean(self.state)
        # A model with scaled rotary embedding changes itself in a pass: see ModelState.absorb.
        self._static = self._lean and has_fixed_rotary(self.model)
        if self._lean:
            own = device_of(self.device).passes(self.model, self.state, self.cuda_graphs)
            self._passes += [*own, LeanPass(self.model)]
        self._passes.append(TransformersPass(self.model, self.state, self.attn_implementation))
        replayed = (each for each in self._passes if isinstance(each, ReplayedPass))
        self._replayed: ReplayedPass | None = next(replayed, None)
        self._chosen = self.state.number

    def _refresh(self) -> None:
        """Select passes again if the model has changed; the caller has its lock."""
        if self.state.look() != self._chosen:
            self._select_passes()

    def _require_layers_in_order(self) -> None:
        """Refuse a model whose layers were added or removed without adjusting indices and config.

        Raises:
            ModelError: ``layer_idx`` of the layers and ``config.num_hidden_layers`` do not agree.
        """
        layers: Any = self.model.get_decoder().layers
        places = [getattr(layer.self_attn, "layer_idx", i) for i, layer in enumerate(layers)]
        if places != list(range(self.config.num_hidden_layers)):
            raise ModelError(
                f"{self.name}: its layers keep their KV at {places}, but its config promises "
                f"{self.config.num_hidden_layers} layers, from 0 on; set config.num_hidden_layers, "
                "and layer_idx of each layer's self_attn"
            )

    def _require_tokens_alike(self) -> None:
        """Refuse adapters with which reading a sequence in parts gives another result.

        Raises:
            ModelError: such an adapter is active.
        """
        adapters = getattr(self.model, "peft_config", None) or {}
        active: Any = getattr(self.model, "active_adapters", ())
        if not adapters or getattr(self.model, "_adapters_disabled", False):
            return
        if callable(active):  # transformers' method, which does not know adapters added by PEFT
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
        """Whether our own passes are exact for the model's current state."""
        with self._lock:
            self._refresh()
            return self._lean

    @property
    def lock(self) -> threading.RLock:
        """Lock of the model, held during each pass."""
        return self._lock

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings (a model may be spread over several devices)."""
        return self.model.get_input_embeddings().weight.device

    def tensor(self, tokens: Sequence[int]) -> Tensor:
        """Token ids as int64 ``[n]`` on :attr:`device`; the host does not wait for the copy."""
        host = torch.tensor(tokens, dtype=torch.long, device="cpu")
        return device_of(self.device).upload(host, self.device)

    @property
    def vocab_size(self) -> int:
        """Width of the logits; may be padded beyond the tokenizer's vocabulary."""
        head = self.model.get_output_embeddings()
        return int(getattr(head, "out_features", self.config.vocab_size))

    @property
    def context_window(self) -> int:
        """Context window in tokens, including YaRN scaling."""
        window = int(self.config.max_position_embeddings)
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "yarn":
            original = rope.get("original_max_position_embeddings") or window
            window = max(window, int(original * rope["factor"]))
        return window

    @property
    def slides(self) -> bool:
        """Whether any layer has a sliding window."""
        types = getattr(self.config, "layer_types", None)
        if types is not None:
            return "sliding_attention" in types
        return getattr(self.config, "sliding_window", None) is not None

    @property
    def copyable(self) -> bool:
        """Whether a copy of the model in its current state would compute the same."""
        with self._lock:
            self._refresh()
            return self.state.copyable

    @property
    def passes(self) -> Sequence[Pass]:
        """Passes that can run the model in its current state, the fastest first."""
        with self._lock:
            self._refresh()
            return tuple(self._passes)

    @property
    def switches(self) -> list[int]:
        """Sequence lengths beyond which the rotary embedding changes for all positions.

        Longrope has one; KV of a shorter sequence is invalid beyond it.
        """
        return [
            int(rope["original_max_position_embeddings"])
            for rope in self._ropes()
            if rope.get("rope_type") == "longrope"
        ]

    def _ropes(self) -> list[dict[str, Any]]:
        """Parameters of the rotary embeddings: one set, or one for each type of layer."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        nested = [each for each in rope.values() if isinstance(each, dict) and "rope_type" in each]
        return nested or [rope]

    def origin(self, length: int) -> KVOrigin:
        """Origin of KV that the model's current state computes; other KV must not be used with it.

        Args:
            length: length of the whole sequence in tokens.

        Raises:
            ModelError: the rotary embedding changes with every token at this length, or an adapter
                is not supported.
        """
        with self._lock:
            self._refresh()
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
        """Like :meth:`origin`, for KV that is kept between calls; also samples the weights.

        None where KV must not be kept, because results depend on injected code.
        """
        with self._lock:
            self.state.take_samples()
            origin = self.origin(length)
            return origin if self.state.traceable else None

    def require(self, kind: WeightKind) -> None:
        """Check that the model can be quantized.

        Args:
            kind: weight format.

        Raises:
            InvalidParameterError: the model or its device does not support the format.
        """
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
        """Weight format for drafting; None for the model's own weights.

        Args:
            quantization: requested quantization.
            auto: whether ``auto`` takes the fastest format, rather than none.

        Raises:
            InvalidParameterError: the quantization is unknown, or not supported for this model.
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
        """Weight format with the fastest draft step; None for the model's own weights."""
        quantizers, passes = device_of(self.device).quantizers, self.passes
        return next((k for k, each in quantizers.items() if each.pays(self.model, passes)), None)

    def quantized(self, kind: WeightKind) -> PreTrainedModel:
        """Quantized copy of the model's current state, freed with the model."""
        quantizer = device_of(self.device).quantizers[kind]
        return quantizer.copy(self.model, self.state, self.passes)

    def capacity_for(self, tokens: int) -> int:
        """Best capacity, in tokens, of a cache for at least ``tokens`` tokens."""
        return device_of(self.device).capacity_for(tokens)

    @property
    def prefill_sizes(self) -> tuple[int, ...]:
        """Sizes of prefill passes in tokens, descending, see :mod:`rapid_llm.engine.chunks`."""
        device = device_of(self.device)
        return device.prefill_chunk, *device.prefill_pieces

    def synchronize(self) -> None:
        """Wait until all work on the device is done."""
        device_of(self.device).synchronize(self.device)

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for ``capacity`` tokens; memory is allocated by the first pass."""
        return KVCache(self.config.num_hidden_layers, capacity)

    def __call__(self, tokens: Tensor, cache: KVCache, keep_logits: int) -> Tensor:
        """Run the model on new tokens and append their KV to the cache.

        Args:
            tokens: token ids after those in the cache, int64 ``[n]`` on any device.
            cache: KV cache with room for n more tokens; it does not change if the pass fails.
            keep_logits: number of last tokens for which logits are computed, 1 to n.

        Returns:
            Logits, float32 ``[keep_logits, vocab_size]``.

        Raises:
            OutdatedKVError: the cached KV was computed with another state of the model.
            ModelError: an unsupported adapter was added.
        """
        ids = tokens.to(self.device, non_blocking=True)
        length = max(cache.expected, cache.length + cache.position_offset + ids.shape[0])

        with self._lock:
            replayed, logits = self._replayed, None
            if replayed is not None and replayed.serves(ids, cache, keep_logits):
                launch = partial(replayed, ids, ids, cache, keep_logits)
                logits = self._launch_then_check(cache, launch)
            if logits is None:
                with self._pass_context(cache, length):
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
        masks: NextMask | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Draft several tokens on the device without the host.

        Arguments and result as for :class:`rapid_llm.engine.cuda.draft_loop.DraftLoop`, errors as
        for :meth:`__call__`. None, with the cache unchanged, where this is not possible.
        """

        def launch(replayed: ReplayedPass) -> tuple[Tensor, Tensor]:
            return replayed.loop(choice)(pending, steps, cache, generator, masks)

        return self._replay(pending.shape[0] + steps - 1, cache, generator, launch)

    def verify(
        self,
        tokens: Tensor,
        q: Tensor,
        eta: Tensor | None,
        cache: KVCache,
        judge: Judge,
        generator: torch.Generator,
        mask: Tensor | None = None,
    ) -> Tensor | None:
        """Run the model over a draft and verify it on the device, in one launch.

        Arguments and result as for :class:`rapid_llm.engine.cuda.verification.Verification`, errors
        as for :meth:`__call__`. None, with the cache unchanged, where this is not possible.
        """
        n = tokens.shape[0]

        def launch(replayed: ReplayedPass) -> Tensor | None:
            if not replayed.serves(tokens, cache, n):
                return None
            return replayed.verification(judge)(tokens, q, eta, cache, generator, mask)

        return self._replay(n, cache, generator, launch)

    def _replay(
        self,
        tokens: int,
        cache: KVCache,
        generator: torch.Generator,
        launch: Callable[[ReplayedPass], _T | None],
    ) -> _T | None:
        """Launch work of the replayed pass for the model's current state; None without one.

        Args:
            tokens: number of tokens that are appended to the cache.
            cache, generator: unchanged where nothing is launched.
            launch: function that launches the work; called again if the model has changed.
        """
        with self._lock:
            replayed = self._replayed
            if replayed is None:
                return None
            drawn = generator.get_state()
            result = self._launch_then_check(cache, partial(launch, replayed))
            if result is None:
                generator.set_state(drawn)
                with self._pass_context(cache, cache.length + cache.position_offset + tokens):
                    if self._replayed is not None:
                        result = launch(self._replayed)
            return result

    def _launch_then_check(self, cache: KVCache, launch: Callable[[], _T | None]) -> _T | None:
        """Launch a captured pass, and check the model for changes while the device works.

        Returns:
            The result; None, with the cache unchanged, if the model is not the captured one.
        """
        start = cache.length
        if cache.origin != KVOrigin(self.state.number, 0):
            return None
        try:
            with torch.autocast(
                self.device.type, enabled=False
            ):  # a capture serves later calls too
                result = launch()
            if self.state.look() == self._chosen:
                return result
        except BaseException:
            cache.rollback(start)
            raise
        cache.rollback(start)
        return None

    @contextmanager
    def _pass_context(self, cache: KVCache, length: int) -> Iterator[None]:
        """Context of a pass: checks the cache's origin, and restores the cache after an error.

        Autocast is off, because KV outlives the caller's autocast context.

        Args:
            cache: KV cache.
            length: length of the whole sequence in tokens.
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
                if not self._static:
                    self.state.absorb()

    def _positions(self, ids: Tensor, cache: KVCache, length: int) -> Tensor:
        """Positions of new tokens, and the sequence's last one if rotary scaling depends on it."""
        first = cache.length + cache.position_offset
        end = first + ids.shape[0]
        positions = torch.arange(first, end, device=self.device)
        if self._scale(length) == self._scale(end):
            return positions
        return torch.cat([positions, positions.new_tensor([length - 1])])
