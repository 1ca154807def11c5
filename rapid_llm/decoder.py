"""The decoder, the main entry point: RAPID (arXiv 2502.20330) over two loaded models.

The target reads the whole context. The drafter reads the retrieved context and proposes γ tokens;
the target verifies them in one pass, against its own distribution enriched by the drafter's. The
rounds themselves are in :mod:`rapid_llm.generation`.

The file is long because it describes every argument, result and error of the API where a reader
looks for them; the code is 300 lines.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from math import fsum
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.arguments import arguments_of
from rapid_llm.batching import Scheduler
from rapid_llm.chat import checked_variables, end_of_turn
from rapid_llm.config import EngineConfig, Quantization, SamplingParams
from rapid_llm.device_maps import placements
from rapid_llm.encoding import Prompt, encode_literal, encode_prompt
from rapid_llm.engine.attention import NAME as RAPID_ATTENTION
from rapid_llm.engine.device import device_of
from rapid_llm.engine.memory import with_memory
from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.engine.prefix_cache.prefixes import PrefixCache
from rapid_llm.engine.quantized_drafter import QuantizedDrafter
from rapid_llm.engine.session import Session
from rapid_llm.errors import ContextWindowError, InvalidParameterError
from rapid_llm.folders import require_folder
from rapid_llm.forked import Owner, ProcessLock, limit_threads
from rapid_llm.generation_factory import GenerationFactory
from rapid_llm.interface import Decoder, GenerationRequest
from rapid_llm.limits import host_memory
from rapid_llm.logprobs import TokenLogprob, logprobs
from rapid_llm.models import device_memory, load_model
from rapid_llm.old_names import RENAMED, OldName, with_new_names
from rapid_llm.options import changed, given, options_of, sorted_into
from rapid_llm.preflight import drafter_options, require_loadable
from rapid_llm.progress import PromptProgress
from rapid_llm.request import ModelPair, Request
from rapid_llm.results import Delta, FinishReason, GenerationResult
from rapid_llm.speculation.constraints import Constraints
from rapid_llm.tensor_parallel import processes_here
from rapid_llm.vocabulary import unshared_tokens

__all__ = ["Delta", "FinishReason", "GenerationResult", "Memory", "PromptProgress", "RapidDecoder"]


@dataclass(frozen=True)
class Memory:
    """Memory that a decoder holds, in bytes.

    Attributes:
        target_weights: bytes of the target's weights.
        drafter_weights: bytes of the drafter's weights that are not shared with the target: those
            of another model and of a quantized copy; 0 where all are shared.
        kept_kv: bytes on the devices of the KV of prompts that is kept for later calls.
        kept_kv_host: bytes of such KV in the host's memory, of devices that do not share it.
        kept_kv_disk: bytes of the files in ``kv_cache_dir``, those of other processes included.
    """

    target_weights: int
    drafter_weights: int
    kept_kv: int
    kept_kv_host: int = 0
    kept_kv_disk: int = 0


class RapidDecoder(Decoder):
    """Generates text with a target model and, optionally, a separate drafter.

    Between calls it keeps the KV of prompts, so that the next question on a document, or the next
    turn of a conversation, reads only new tokens. After a closed stream, an interrupt or an error
    it keeps the part of the prompt that was read. Calls from several threads are safe; forward
    passes on one model take turns.

    Changes to a model take effect at the next call: adapters, hooks and edited weights. The model
    is put into evaluation mode.

    Args:
        model: the target, a loaded transformers model or a PeftModel.
        tokenizer: the target's tokenizer.
        drafter: a loaded model with the same tokenizer; None lets the target draft for itself
            (self-speculation: shared weights, two caches).
        drafter_tokenizer: the drafter's tokenizer, to compare with the target's; without it the
            vocabularies must have the same size. The two may differ in added tokens: a token that
            only one of them has is never drafted, and a draft prompt that holds one is left out.
        name, drafter_name: names of the models in errors and results.
        attn_implementation: ``rapid`` (this library's), or transformers' ``sdpa``,
            ``flash_attention_2`` or ``eager``.
        cuda_graphs: whether passes of up to 17 tokens of the Llama family, and whole drafts, are
            replayed from CUDA graphs, which saves kernel launches. None: where possible (Ampere or
            newer, with Triton); False: never; True: raise where it is not possible.
        drafter_quantization: weight format of the drafter's quantized copy. ``int4`` is 4-bit
            weights on a GPU (bfloat16, Ampere or newer), or on a CPU for checkpoints of 4-bit
            weights (GGUF's Q4_1); ``int8`` is 8-bit weights on a CPU; ``auto`` picks the fastest
            where the target drafts for itself (on a CPU in bfloat16 only, on a GPU from a gigabyte
            of weights on) and makes no copy elsewhere; None makes no copy. The copy is made at the
            first draft. Models with hooks or replaced methods are not copied.
        kv_cache_bytes: budget in bytes for the KV of prompts kept on the devices between calls
            (LRU); None is a quarter of the device's memory, 0 keeps nothing there. Of the host's
            memory each rank on a machine takes its part by default.
        kv_cache_host_bytes: budget in bytes for KV that has left a device with memory of its own,
            in pinned host memory; None is an eighth of what the process may use, or 0 where
            ``kv_cache_bytes`` is 0. On a CPU it adds nothing.
        kv_cache_dir: folder for the KV of long prompts, kept across processes (safetensors with a
            checksum; valid for this model, dtype and these tokens only).
        kv_cache_dir_bytes: maximum bytes of the folder's files, whoever wrote them, least recently
            used deleted first; None is a quarter of the space on its file system that is free or
            taken by these files.
        max_sequences: maximum number of requests that are answered at once by
            :meth:`generate_many` and :attr:`scheduler`; more wait. 1 answers them one by one.
        chat_template_kwargs: variables of the model's chat template (``enable_thinking``, …) for
            all prompts of chat messages.

    Raises:
        ModelError: an architecture or an adapter is not supported.
        TokenizerMismatchError: the tokenizers differ in more than added tokens.
        InvalidParameterError: the quantization is unknown, or not available on the device; a budget
            is negative, or the folder's has no folder; the folder cannot be written to.
    """

    @with_new_names
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        drafter: PreTrainedModel | None = None,
        *,
        drafter_tokenizer: PreTrainedTokenizerBase | None = None,
        name: str | None = None,
        drafter_name: str | None = None,
        attn_implementation: str = RAPID_ATTENTION,
        cuda_graphs: bool | None = None,
        drafter_quantization: Quantization | None = "auto",
        kv_cache_bytes: int | None = None,
        kv_cache_host_bytes: int | None = None,
        kv_cache_dir: str | Path | None = None,
        kv_cache_dir_bytes: int | None = None,
        max_sequences: int = EngineConfig.max_sequences,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        options = dict(locals())  # as they were given, to be pickled with the models
        limit_threads()
        self.max_sequences = changed(EngineConfig(), {"max_sequences": max_sequences}).max_sequences
        # A copy: the caller may let theirs cut or pad, which a fast tokenizer remembers.
        self.tokenizer = copy.deepcopy(tokenizer)
        self.chat_template_kwargs = checked_variables(chat_template_kwargs)
        del options["self"]
        own = {"tokenizer": self.tokenizer, "chat_template_kwargs": self.chat_template_kwargs}
        self._made_of: EngineConfig | dict[str, Any] = options | own
        self.target = ModelRunner(model, name or _name_of(model), attn_implementation, cuda_graphs)
        self.drafter = self.target
        unshared: frozenset[int] = frozenset()
        if drafter is not None and drafter is not model:
            self.drafter = ModelRunner(
                drafter, drafter_name or _name_of(drafter), attn_implementation, cuda_graphs
            )
            unshared = unshared_tokens(self.target, self.drafter, tokenizer, drafter_tokenizer)
        # Both models run together where one of them is sharded: its drafts must be the same ones.
        self.target.ranks = self.drafter.ranks = self.target.ranks or self.drafter.ranks
        if kv_cache_bytes is None:
            place = self.target.device
            sharing = 1 if device_of(place).own_memory else processes_here()
            kv_cache_bytes = (device_memory(place) or 0) // (4 * sharing)
        if kv_cache_host_bytes is None:
            whole = host_memory() or 0
            kv_cache_host_bytes = whole // (8 * processes_here()) if kv_cache_bytes else 0
        self._prefixes = PrefixCache(
            kv_cache_bytes,
            None if kv_cache_dir is None else require_folder("kv_cache_dir", kv_cache_dir),
            host_bytes=kv_cache_host_bytes,
            directory_bytes=kv_cache_dir_bytes,
        )
        self._loaded_in = Owner(f"the decoder of {self.target.name}")
        self._quantized = QuantizedDrafter(
            self.drafter,
            drafter_quantization,
            auto=self.drafter is self.target,
            discard=self._prefixes.forget,
        )
        self._pair = ModelPair(
            self.target,
            self.drafter,
            self.tokenizer,
            unshared,
            end_of_turn(tokenizer),
            Constraints(self.tokenizer),
        )
        self.generations = GenerationFactory(self._pair, self._quantized, self._prefixes)
        self._scheduler: ReferenceType[Scheduler] | None = None
        self._choosing = ProcessLock()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = EngineConfig.model,
        drafter: str | Path | PreTrainedModel | None = None,
        **options: Any,
    ) -> RapidDecoder:
        """Load the models by name (see :func:`rapid_llm.models.load_model`).

        Args:
            model: hub id, folder, GGUF file or packaged model's name of the target.
            drafter: name of the drafter in the same form, or a loaded model; None is
                self-speculation.
            options: options of :class:`rapid_llm.EngineConfig`. Any others are ``hub_options``,
                arguments of ``from_pretrained`` for the model and its tokenizer. Those that
                concern access to a hub (``token``, ``cache_dir``, ``revision``,
                ``trust_remote_code``, …) apply to a drafter loaded by name as well.

        Raises:
            InvalidParameterError: an option is outside its range, or has no effect.
            ModelError: the model does not exist, or cannot be loaded.
            MissingDependencyError: a package that a model needs is not installed.
        """
        known = options_of(EngineConfig)
        others = options.keys() - known.keys() - RENAMED.keys()
        hub = {name: options.pop(name) for name in others}
        if hub:
            options["hub_options"] = {**(options.get("hub_options") or {}), **hub}
        named = drafter if isinstance(drafter, str | Path) else None
        (config,) = sorted_into({**options, "model": model, "drafter": named}, EngineConfig)
        return cls.from_config(config, None if named is not None else drafter)

    @classmethod
    def from_config(
        cls, config: EngineConfig, drafter: PreTrainedModel | None = None
    ) -> RapidDecoder:
        """Load the models that a config names.

        Args:
            config: models, devices and engine options.
            drafter: a loaded drafter, used instead of the config's.
        """
        place, draft_place = placements(config)
        require_loadable(config, place, draft_place if drafter is None else None)
        hub = dict(config.hub_options)
        loaded = load_model(config.model, dtype=config.dtype, **place | hub)
        tokenizer, name, draft_by_name = None, None, drafter is None
        own = config.drafter != config.model or draft_place != place or config.drafter_options
        if config.drafter is not None and own:
            options = draft_place | drafter_options(config)
            other = load_model(config.drafter, dtype=config.dtype, **options)
            drafter, tokenizer, name = other.model, other.tokenizer, other.name
        decoder = cls(
            loaded.model,
            loaded.tokenizer,
            drafter,
            drafter_tokenizer=tokenizer,
            name=loaded.name,
            drafter_name=name,
            **{name: getattr(config, name) for name in _OPTIONS},
        )
        if draft_by_name:
            decoder._made_of = config
        return decoder

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the names that it was loaded by, or as its models; never with kept KV.

        Nor with secrets among ``hub_options``: where the pickle is opened, transformers finds a
        token in the environment or in the hub's own file.
        """
        made_of = self._made_of
        if isinstance(made_of, EngineConfig):
            made_of = made_of.without_secrets()
        return _unpickled, (type(self), made_of)

    draft_forward = OldName("draft_runner")

    @property
    def draft_runner(self) -> ModelRunner:
        """Runner of the model that drafts: the drafter, or its quantized copy.

        The copy is made at the first use, and again when weights or adapters have changed. Models
        with hooks or replaced methods are not copied.
        """
        return self._quantized.runner

    @property
    def memory(self) -> Memory:
        """Current memory of the models and the kept KV, without that of running generations."""
        own = 0 if self.drafter is self.target else _weight_bytes(self.drafter.model)
        return Memory(
            target_weights=_weight_bytes(self.target.model),
            drafter_weights=own + self._quantized.nbytes,
            kept_kv=self._prefixes.nbytes,
            kept_kv_host=self._prefixes.host_nbytes,
            kept_kv_disk=self._prefixes.disk_nbytes,
        )

    def clear_cache(self) -> None:
        """Free the KV that is kept for later prompts; files stay.

        Call it after single values of the weights were edited through ``.data``, NumPy or inside a
        quantized tensor. All other changes to a model are detected, see
        :class:`rapid_llm.engine.model_state.ModelState`, and its KV is then computed again.
        """
        self._prefixes.clear()

    def keep_only(self, prompt: Prompt) -> int:
        """Free the kept KV except the target's KV of one prompt.

        The prefill of a later call on this prompt then takes the same time, whatever prompts were
        read in between.

        Args:
            prompt: prompt whose KV stays.

        Returns:
            Number of the prompt's tokens whose KV is kept: all but the last, if it was the latest.
        """
        self._loaded_in.require()
        ids = encode_prompt(prompt, self.tokenizer, self.chat_template_kwargs)
        return self._prefixes.keep_only(self.target, ids)

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler for calls of threads and tasks that are to be answered at once.

        It is one object as long as it is in use or held by someone.
        """
        with self._choosing:
            found = None if self._scheduler is None else self._scheduler()
            if found is None:
                found = Scheduler(self)
                # Weak, so that the memory of a decoder that is dropped is freed at once.
                self._scheduler = ref(found)
            return found

    @arguments_of(GenerationRequest)
    def request(self, request: GenerationRequest) -> Request:
        """Validate a call of :meth:`stream`, and encode its prompts; no model runs.

        Raises:
            RapidError: any error of :meth:`stream` that it does not raise while streaming.
        """
        self._loaded_in.require()
        with self._checking():
            return self._pair.request(
                request.target_prompt,
                request.draft_prompt,
                given(request.sampling, SamplingParams, "sampling"),
                request.speculation,
                request.confidence,
                self.chat_template_kwargs | checked_variables(request.chat_template_kwargs),
            )

    @arguments_of(GenerationRequest)
    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        """Answer a prompt and yield one delta per round.

        Args:
            target_prompt: the whole context and the question, as a string (no template is applied),
                chat messages (the model's template is applied) or token ids. None lets the drafter
                answer alone from its own prompt (plain RAG).
            draft_prompt: the retrieved context and the question. None decodes with the target
                alone.
            sampling: sampling options; greedy by default.
            speculation: speculation options; ignored without a draft prompt.
            confidence: confidence of the retrieval, in [0, 1]; used with ``dynamic_eta``.
            progress: callback for the progress of the prefill.
            chat_template_kwargs: variables of the chat template for this call; they override the
                decoder's variables of the same names.

        Yields:
            The text and tokens of each round. ``max_new_tokens`` is reduced to the room in the
            context window, see ``stats.max_new_tokens``. A draft prompt too long for the drafter
            is left out, see ``stats.draft_skipped``.

        Raises:
            InvalidParameterError: neither prompt was given, one is malformed, or the confidence is
                outside its range.
            ContextWindowError: the prompt to answer leaves no room for a token in its model's
                context window.
            TokenizerMismatchError: the prompt to answer has a token that its model lacks.
            NumericalError: a model produced NaN (raised while streaming).
            ForkedProcessError: this process was forked from the one that loaded the models.
            GenerationTimeoutError: ``sampling.timeout`` seconds have passed since the call (raised
                while streaming, between two chunks of the prefill or after a round).
        """
        started = time.perf_counter()
        validated = self.request(*request.prompts, **request.options)
        return self.generations.answer(validated, started, request.progress)

    def _stream_many(
        self, requests: Sequence[GenerationRequest], return_exceptions: bool
    ) -> Iterator[tuple[int, Delta | Exception]]:
        return self.scheduler._stream_many(requests, return_exceptions)

    def _checking(self) -> AbstractContextManager[None]:
        """Context in which the arguments of a call are checked."""
        ranks = self.target.ranks
        return nullcontext() if ranks is None else ranks.checking()

    def log_likelihood(self, prompt: Prompt, continuation: str, *, drafter: bool = False) -> float:
        """Natural logarithm of the probability of a continuation given a prompt.

        Args:
            prompt: prompt in any form that :meth:`stream` takes.
            continuation: text of at least one token; control tokens in it are ordinary text.
            drafter: whether to score with the drafter instead of the target.

        Raises:
            InvalidParameterError: the prompt is malformed, or the continuation has no tokens.
            ContextWindowError: both together exceed the model's window.
            NumericalError: the model produced NaN.
            ForkedProcessError: this process was forked from the one that loaded the models.
        """
        with self._checking():
            tokens = encode_literal(continuation, self.tokenizer)
            if not tokens:
                raise InvalidParameterError(
                    f"continuation={continuation!r} has no tokens; give some text"
                )
        return fsum(each.logprob for each in self.logprobs(prompt, tokens, drafter=drafter))

    def logprobs(
        self,
        prompt: Prompt,
        token_ids: Sequence[int],
        top: int = 0,
        *,
        drafter: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[TokenLogprob]:
        """Natural logarithms of the probabilities of tokens that follow a prompt.

        They are the model's own, at temperature 1 and without other processors.

        Args:
            prompt: prompt in any form that :meth:`stream` takes.
            token_ids: ids of the tokens, at least one.
            top: number of the most likely tokens to tell at each place.
            drafter: whether to score with the drafter instead of the target.
            chat_template_kwargs: variables of the chat template, as :meth:`stream` takes them.

        Raises:
            InvalidParameterError: the prompt is malformed, or there are no tokens.
            ContextWindowError: both together exceed the model's window.
            NumericalError: the model produced NaN.
            ForkedProcessError: this process was forked from the one that loaded the models.
        """
        self._loaded_in.require()
        runner = self.drafter if drafter else self.target
        with self._checking():
            tokens = encode_prompt(token_ids, self.tokenizer)
            variables = self.chat_template_kwargs | checked_variables(chat_template_kwargs)
            ids = encode_prompt(prompt, self.tokenizer, variables)
            self._pair.require_readable([*ids, *tokens], runner)
            if len(tokens) > (room := self._pair.room(ids, runner)):
                raise ContextWindowError(
                    f"the prompt of {len(ids)} tokens leaves room for {room} in the context window "
                    f"of {runner.name}, {runner.context_window} tokens, and the continuation has "
                    f"{len(tokens)}; shorten one of them"
                )
        with ExitStack() as stack:
            if runner.ranks is not None:
                stack.enter_context(
                    runner.ranks.call(
                        "logprobs", runner.name, runner.settings, drafter, ids, tokens
                    )
                )
            held = stack.enter_context(self._prefixes.lease(runner, ids, len(ids) + len(tokens)))
            if runner.ranks is not None:
                held.cache.rollback(runner.ranks.least_kept(held.reused))
            session = Session(runner, held.cache, ids)
            return with_memory(
                partial(logprobs, session, ids, tokens, top), self._prefixes.free_devices
            )


_OPTIONS = signature(RapidDecoder).parameters.keys() & options_of(EngineConfig).keys() - {
    "model",
    "drafter",
}
"""Options of the engine that a decoder takes with loaded models."""


def _unpickled(cls: type[RapidDecoder], made_of: EngineConfig | dict[str, Any]) -> RapidDecoder:
    if isinstance(made_of, EngineConfig):
        return cls.from_config(made_of)
    return cls(**made_of)


def _name_of(model: PreTrainedModel) -> str:
    return getattr(model, "name_or_path", "") or type(model).__name__


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
