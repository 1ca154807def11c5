"""A loaded model as a function: token ids and a cache in, logits out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from rapid_llm.engine import attention
from rapid_llm.engine.cuda import has_kernels, int4
from rapid_llm.engine.identity import ModelState
from rapid_llm.engine.kv_cache import KVCache, Reader
from rapid_llm.engine.lean import has_fixed_rotary, is_lean, lean_logits
from rapid_llm.engine.native_pass import NativePass, native_pass
from rapid_llm.engine.quantization import int8_pays, int8_twin, require_int8, twin_of
from rapid_llm.errors import (
    InvalidParameterError,
    MissingDependencyError,
    ModelError,
    OutdatedKVError,
)

if TYPE_CHECKING:  # they need Triton, which not every machine has
    from rapid_llm.engine.cuda.captured import CapturedPasses

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

FewBits = Literal["int8", "int4"]
"""Kinds of weights that a draft step reads faster than a model's own."""

_locks: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_locks_guard = threading.Lock()


def _lock_of(model: PreTrainedModel) -> threading.RLock:
    """One lock a model, however many decoders were built around it."""
    with _locks_guard:
        return _locks.setdefault(model, threading.RLock())


class Choice(Protocol):
    """How a draft step goes from logits to a token, where no history counts. Hashable.

    Attributes:
        width: tokens that q is over.
    """

    @property
    def width(self) -> int: ...

    def __call__(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Float32 ``[1, vocab]`` to q, float32 ``[width]``, and an int64 scalar drawn from it."""


class Forward:
    """Runs a model over our cache: a lean forward pass where there is one, or its own.

    The model is what it is at each call: see :class:`rapid_llm.engine.identity.ModelState`, which
    says what is followed, and what its user must say by :meth:`RapidDecoder.clear_cache`.

    Args:
        model: a decoder-only transformers model.
        name: what errors and results call it.
        attn_implementation: ``rapid`` (ours), or one of transformers' own, which always runs
            the model's own forward pass.
        cuda_graphs: whether passes of few tokens are replayed from CUDA graphs: None where they
            can be (a lean pass, on Ampere or newer, with Triton), False nowhere. True insists.

    Raises:
        ModelError: the architecture, an adapter or the attention implementation is not supported.
            Calls raise it too, as adapters may be added later.
        InvalidParameterError: ``cuda_graphs=True`` where passes cannot be captured.
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
        if cuda_graphs and self._captured is None:
            raise InvalidParameterError(
                f"cuda_graphs=True, but passes of {name} on {self.device} cannot be captured: that "
                "takes a model of the Llama family with our attention, Triton, and an Ampere GPU "
                "or a newer one; leave cuda_graphs out to capture where it can be done"
            )

    def _choose(self) -> None:
        """Passes for the model as it is now."""
        self._chosen: int | None = None
        self._captured: CapturedPasses | None = None
        self._native: NativePass | None = None
        self._require_layers_in_order()
        self._require_tokens_alike()
        self._lean = self.attn_implementation == attention.NAME and is_lean(self.state)
        # What a scaled rotary embedding does to itself in a pass is for :meth:`absorb`.
        self._leaves_itself = self._lean and has_fixed_rotary(self.model)
        if self._lean:
            self._native = native_pass(self.model)
        if self._leaves_itself and self.cuda_graphs is not False and has_kernels(self.device):
            from rapid_llm.engine.cuda.captured import CapturedPasses

            self._captured = CapturedPasses(self.model)
            self.state.look()  # projections were fused: their weights have moved
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
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

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
    def compiled(self) -> bool:
        """Whether few tokens are read by the compiled kernels, as the model is now."""
        with self._lock:
            self._follow()
            return self._native is not None

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

    def reader(self, length: int) -> Reader:
        """What reads a sequence of so many tokens now: KV that another one read is of no use.

        Raises:
            ModelError: the rotary embedding changes with every token at such lengths, or an adapter
                is not supported.
        """
        with self._lock:
            self._follow()
            return Reader(self.state.number, self._scale(length))

    def _scale(self, length: int) -> int:
        window = int(self.config.max_position_embeddings)
        if length > window and any(rope.get("rope_type") == "dynamic" for rope in self._ropes()):
            raise ModelError(
                f"{self.name} scales its rotary embedding dynamically: beyond {window} tokens "
                f"(here {length}) each new one changes all before it; stay below, or load the "
                "model with rope_type 'yarn'"
            )
        return sum(length > switch for switch in self.switches)

    def kept_reader(self, length: int) -> Reader | None:
        """As :meth:`reader`, for KV that is kept between calls.

        Looks at the weights more closely. None where KV must not be kept: what the model computes
        depends on code that somebody has put in, and on what that code may read.
        """
        with self._lock:
            self.state.take_samples()
            reader = self.reader(length)
            return reader if self.state.traceable else None

    def require(self, kind: FewBits) -> None:
        """Raises InvalidParameterError where this model cannot have weights of so few bits."""
        if kind == "int8":
            require_int8(self.model)
        elif not int4.runs_on(self.model):
            raise InvalidParameterError(
                f"drafter_quantization='int4' needs a drafter in bfloat16 on an Ampere GPU or a "
                f"newer one, with layers of multiples of 128 inputs, but {self.name} is in "
                f"{self.model.dtype} on {self.device}; load it so (dtype='bfloat16'), or leave "
                "drafter_quantization out"
            )

    @property
    def cheapest(self) -> FewBits | None:
        """The kind of weights with which a draft step takes least, None for its own."""
        if int8_pays(self.model):
            return "int8"
        return "int4" if int4.pays(self.model) else None

    def twin(self, kind: FewBits) -> PreTrainedModel:
        """The model over weights of few bits, made for what it is now and freed with it."""
        if kind == "int8":
            return int8_twin(self.model, self.compiled, self.state)
        lean = self.lean

        def make(model: PreTrainedModel) -> PreTrainedModel:
            return int4.int4_copy(model, lean=lean)

        return twin_of(self.model, self.state, (kind, lean), make)

    def capacity_for(self, tokens: int) -> int:
        """Tokens that a cache for so many is best made for.

        On CUDA whole thousands: cuDNN makes, and keeps, plans for each size of buffers.
        """
        return tokens + -tokens % 1024 if self.device.type == "cuda" else tokens

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
        end = cache.length + cache.skipped + ids.shape[0]
        length = max(cache.expected, end)

        with self._lock:
            captured, logits = self._captured, None
            if captured is not None and length == end and captured.serves(ids, cache):
                logits = self._ahead(cache, partial(captured, ids, cache, keep_logits))
            if logits is None:
                with self._reading(cache, length):
                    run = self._lean_pass if self._lean else self._own_pass
                    logits = run(ids, cache, keep_logits, length)
            return logits.float()

    def draft(
        self,
        pending: Tensor,
        steps: int,
        cache: KVCache,
        choice: Choice,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor] | None:
        """Draft steps that feed one another on the device.

        See :class:`rapid_llm.engine.cuda.draft_loop.DraftLoop`, for the errors :meth:`__call__`.
        None, and nothing is read, where the host must take part.
        """

        arguments = pending, steps, cache, generator
        end = cache.length + cache.skipped + pending.shape[0] + steps - 1
        with self._lock:
            drafted = None
            if self._captured is not None:
                drafted = self._ahead(cache, partial(self._captured.loop(choice), *arguments))
            if drafted is None:
                with self._reading(cache, end):
                    if self._captured is not None:
                        drafted = self._captured.loop(choice)(*arguments)
            return drafted

    def _ahead(self, cache: KVCache, launch: Callable[[], _T]) -> _T | None:
        """What a captured pass gives; the model is looked at while the device works.

        None, and nothing was appended, if the model is no longer what was captured.
        """
        start = cache.length
        if cache.reader != Reader(self.state.number, 0):
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
            reader = self.reader(length)
            if start == 0:
                cache.reader = reader
            elif cache.reader not in (None, reader):
                raise OutdatedKVError(
                    f"{self.name} has changed since it read the first {start + cache.skipped} "
                    "tokens; read them again with the weights and the adapter that it has now"
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

    def _lean_pass(self, ids: Tensor, cache: KVCache, keep: int, length: int) -> Tensor:
        if self._captured is not None:
            whole = length == cache.length + cache.skipped + len(ids)
            if whole and self._captured.serves(ids, cache):
                return self._captured(ids, cache, keep)
            return self._captured.read(ids, cache, keep)
        positions = self._positions(ids, cache, length)
        if self._native is not None and self._native.serves(ids, cache, keep):
            return self._native(ids, positions, cache, keep)
        return lean_logits(self.model, ids, positions, cache, keep)

    def _positions(self, ids: Tensor, cache: KVCache, length: int) -> Tensor:
        """Of the tokens; the sequence's last follows where a rotary embedding goes by that."""
        first = cache.length + cache.skipped
        end = first + ids.shape[0]
        positions = torch.arange(first, end, device=self.device)
        if self._scale(length) == self._scale(end):
            return positions
        return torch.cat([positions, positions.new_tensor([length - 1])])

    def _own_pass(self, ids: Tensor, cache: KVCache, keep: int, length: int) -> Tensor:
        positions = self._positions(ids, cache, length)
        with self._attention(), self._turned_for(positions[len(ids) :]):
            output = self.model(
                input_ids=ids[None],
                position_ids=positions[None, : len(ids)],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        logits: Tensor = output.logits[0]
        return logits

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Our attention for one pass only: the caller's own use of the model must not change."""
        configs: list[Any] = [c for c in self.state.configs if type(c) is type(self.config)]
        before = [config._attn_implementation for config in configs]
        for config in configs:  # a module that was copied has its own
            config._attn_implementation = self.attn_implementation
        try:
            yield
        finally:
            for config, name in zip(configs, before, strict=True):
                config._attn_implementation = name

    @contextmanager
    def _turned_for(self, last: Tensor) -> Iterator[None]:
        """The model's rotary embedding as for a sequence up to a position, ``[1]`` or none."""
        with ExitStack() as hooks:
            for module in self.model.modules() if len(last) else ():
                if hasattr(module, "rope_type"):
                    longer = partial(_with_position, last)
                    hooks.enter_context(
                        _removed(module.register_forward_pre_hook(longer, with_kwargs=True))
                    )
                    hooks.enter_context(_removed(module.register_forward_hook(_without_last)))
            yield


def _with_position(
    last: Tensor, module: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a rotary embedding, (x, position_ids, …), with one more position."""
    given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | options
    given["position_ids"] = torch.cat([given["position_ids"], last[None]], dim=1)
    return (), given


def _without_last(module: torch.nn.Module, args: Any, output: tuple[Tensor, ...]) -> Any:
    return tuple(part[:, :-1] for part in output)


@contextmanager
def _removed(hook: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()
