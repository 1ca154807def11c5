"""RAPID: retrieval-augmented speculative decoding (arXiv 2502.20330).

The target reads the whole context. The drafter reads what was retrieved and proposes γ tokens;
the target verifies them in one pass, against its own distribution enriched by the drafter's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.aio import iterate_in_thread
from rapid_llm.chat import checked_variables, end_of_turn
from rapid_llm.config import EngineConfig, Quantization, SamplingParams, SpeculationConfig
from rapid_llm.encoding import Prompt, encode_literal, encode_prompt
from rapid_llm.engine.attention import NAME as RAPID_ATTENTION
from rapid_llm.engine.costs import ROOM, pass_cost
from rapid_llm.engine.forward import FewBits, Forward
from rapid_llm.engine.quantized import quantized_nbytes
from rapid_llm.engine.reuse import Lease, PrefixCache
from rapid_llm.engine.session import Session
from rapid_llm.errors import (
    ContextWindowError,
    GenerationTimeoutError,
    InvalidParameterError,
    NumericalError,
    TokenizerMismatchError,
)
from rapid_llm.models import HUB_ACCESS, device_memory, load_model, resolve_device
from rapid_llm.options import options_of, real, sorted_into
from rapid_llm.speculation.acceptance import dynamic_eta, verify_greedy, verify_sampled
from rapid_llm.speculation.drafters import compressed
from rapid_llm.speculation.drafters.base import Draft, Drafter
from rapid_llm.speculation.drafters.lookup import CERTAIN, LookupDrafter
from rapid_llm.speculation.drafters.rag import RagDrafter
from rapid_llm.speculation.sampling import Sampler, generation_config, least_new_tokens
from rapid_llm.speculation.schedule import AdaptiveSchedule, FixedSchedule, Schedule
from rapid_llm.stats import NO_DRAFT_PROMPT, NOTHING_PAID, Method, Stats
from rapid_llm.text import TextStream

FinishReason = Literal["stop", "length"]
_NAN = "{name} produced NaN logits; check its weights, or load it in another dtype"
DRAFTED: tuple[Method, ...] = ("rapid", "sd")
"""Methods in which the target verifies drafts."""

Progress = Callable[[Literal["draft", "target"], int, int], None]
"""Called during prefill with (whose prompt, tokens read, tokens to read)."""


@dataclass(frozen=True)
class Chunk:
    """What one round added.

    Attributes:
        text: final text; empty while a character or a stop string may still be incomplete.
        token_ids: the round's tokens.
        finish_reason: set on the last chunk: ``stop`` (an end-of-sequence token of the model or the
            tokenizer, the chat template's end of a turn, or a stop string) or ``length``
            (``max_new_tokens``).
        stats: running totals, complete on the last chunk.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stats: Stats


@dataclass(frozen=True)
class GenerationResult:
    """A finished answer.

    Attributes:
        text: without special tokens, cut before a stop string.
        token_ids: every token generated, the ending one included.
        finish_reason: ``stop`` or ``length``.
        stats: counts and seconds.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: Stats

    @classmethod
    def from_chunks(cls, chunks: Sequence[Chunk]) -> GenerationResult:
        """The answer that a stream, read to its end, has given."""
        last = chunks[-1]
        assert last.finish_reason is not None
        return cls(
            text="".join(chunk.text for chunk in chunks),
            token_ids=[token for chunk in chunks for token in chunk.token_ids],
            finish_reason=last.finish_reason,
            stats=last.stats,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes that a decoder holds.

    Attributes:
        target_weights: of the target.
        drafter_weights: beside those: another model's, a quantized twin's, or 0 where shared.
        kept_kv: keys and values of prompts, kept for later ones.
    """

    target_weights: int
    drafter_weights: int
    kept_kv: int


class RapidDecoder:
    """A target model, and optionally a drafter of its own.

    Between calls it keeps the KV of prompts that were read, and nothing else: the next question on
    a document, or the next turn of a conversation, reads only what is new. A closed stream, an
    interrupt or an error leaves what was read until then. Calls from several threads are safe;
    forward passes on one model take turns.

    A model answers as it is at each call: adapters, hooks and edited weights count, whenever they
    came. It is put into evaluation mode.

    Args:
        target: a loaded transformers model, or a PeftModel.
        tokenizer: the target's.
        drafter: a loaded model with the same tokenizer; None lets the target draft as well
            (self-speculation: shared weights, two caches).
        drafter_tokenizer: the drafter's, to be compared; without it the sizes of the
            vocabularies must agree. The two may differ in added tokens: what only one of them has
            is never drafted, and a draft prompt that holds it is left out.
        name, drafter_name: what errors and results call the models.
        attn_implementation: ``rapid`` (ours), or transformers' ``sdpa``, ``flash_attention_2``
            or ``eager``.
        cuda_graphs: replay passes of up to 17 tokens of the Llama family, and whole drafts, from
            CUDA graphs, which saves their launches: None where it can be done (Ampere or newer,
            with Triton), False nowhere; True raises where it cannot.
        drafter_quantization: ``int8`` drafts with int8 weights on a CPU (a copy of the drafter's,
            made at the first draft; layers of a checkpoint that has 4 bits, as GGUF's Q4_1, keep
            these), ``int4`` with 4-bit weights on a GPU (bfloat16, Ampere or newer); ``auto`` does
            what pays for a target that drafts for itself: int8 in bfloat16 on a CPU, int4 for a
            gigabyte of weights and more; None never. There is no quantized copy of a model with
            hooks or replaced methods.
        kv_cache_bytes: of prompts' KV kept between calls, least recently used first out; None is a
            quarter of the device's memory, 0 keeps nothing.
        kv_cache_dir: a folder that keeps the KV of long prompts across processes (safetensors, with
            a checksum; for this model, dtype and these tokens only). It has no limit of size.
        chat_template_kwargs: variables of the model's chat template (``enable_thinking``, …), for
            every prompt of chat messages.

    Raises:
        ModelError: an architecture or an adapter is not supported.
        TokenizerMismatchError: the tokenizers differ in more than added tokens.
        InvalidParameterError: an unknown quantization, or one that the device does not have.
    """

    def __init__(
        self,
        target: PreTrainedModel,
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
        kv_cache_dir: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.chat_template_kwargs = checked_variables(chat_template_kwargs)
        self.target = Forward(target, name or _name_of(target), attn_implementation, cuda_graphs)
        self.drafter = self.target
        self._unshared: frozenset[int] = frozenset()
        if drafter is not None and drafter is not target:
            self.drafter = Forward(
                drafter, drafter_name or _name_of(drafter), attn_implementation, cuda_graphs
            )
            self._unshared = self._check_tokenizers(drafter_tokenizer)
        self._few_bits = self._resolve(drafter_quantization)
        self._twin: Forward | None = None
        if kv_cache_bytes is None:
            kv_cache_bytes = (device_memory(self.target.device) or 0) // 4
        self._prefixes = PrefixCache(
            kv_cache_bytes, None if kv_cache_dir is None else Path(kv_cache_dir)
        )
        self._end_of_turn = end_of_turn(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = EngineConfig.model,
        drafter: str | Path | PreTrainedModel | None = None,
        **options: Any,
    ) -> RapidDecoder:
        """Load the models by name (see :func:`rapid_llm.models.load_model`).

        Args:
            model: the target: hub id, folder, GGUF file or the packaged model's name.
            drafter: the same, or a loaded model; None is self-speculation.
            options: of :class:`rapid_llm.EngineConfig`. Any others are ``hub_options``, for
                ``from_pretrained`` of the model and its tokenizer; those of them that say how to
                reach a hub (``token``, ``cache_dir``, ``revision``, ``trust_remote_code``, …)
                count for a drafter loaded by name as well.

        Raises:
            InvalidParameterError: an option is outside its range, or of no use.
            ModelError: there is no such model, or it could not be loaded.
            MissingDependencyError: a package that a model needs is not installed.
        """
        known = options_of(EngineConfig)
        hub = {name: options.pop(name) for name in options.keys() - known.keys()}
        if hub:
            options["hub_options"] = {**(options.get("hub_options") or {}), **hub}
        named = drafter if isinstance(drafter, str | Path) else None
        (config,) = sorted_into({**options, "model": model, "drafter": named}, EngineConfig)
        return cls.from_config(config, None if named is not None else drafter)

    @classmethod
    def from_config(
        cls, config: EngineConfig, drafter: PreTrainedModel | None = None
    ) -> RapidDecoder:
        """Load what a config names; ``drafter`` is a loaded one in the place of its drafter."""
        place = resolve_device(config.device)
        draft_place = (
            place if config.drafter_device is None else resolve_device(config.drafter_device)
        )
        if draft_place != place and config.drafter is None:
            raise InvalidParameterError(
                f"drafter_device={config.drafter_device!r} needs a drafter to load there: name one "
                "(the target's own name loads a second copy), or leave drafter_device out"
            )
        if config.drafter_options and config.drafter is None:
            raise InvalidParameterError(
                f"drafter_options={sorted(config.drafter_options)} need a drafter to load with "
                "them: name one, or leave them out"
            )
        hub = dict(config.hub_options)
        loaded = load_model(config.model, dtype=config.dtype, device=place, **hub)
        tokenizer, name = None, None
        own = config.drafter != config.model or draft_place != place or config.drafter_options
        if config.drafter is not None and own:
            shared = {k: v for k, v in hub.items() if k in HUB_ACCESS}
            other = load_model(
                config.drafter,
                dtype=config.dtype,
                device=draft_place,
                **shared | dict(config.drafter_options),
            )
            drafter, tokenizer, name = other.model, other.tokenizer, other.name
        return cls(
            loaded.model,
            loaded.tokenizer,
            drafter,
            drafter_tokenizer=tokenizer,
            name=loaded.name,
            drafter_name=name,
            attn_implementation=config.attn_implementation,
            cuda_graphs=config.cuda_graphs,
            drafter_quantization=config.drafter_quantization,
            kv_cache_bytes=config.kv_cache_bytes,
            kv_cache_dir=config.kv_cache_dir,
            chat_template_kwargs=config.chat_template_kwargs,
        )

    @property
    def draft_forward(self) -> Forward:
        """What drafts: the drafter, or its twin of few bits, quantized when first asked for.

        The twin is of the drafter as it is now: it is made anew when weights or adapters changed,
        and there is none of a model with hooks or replaced methods.
        """
        if self._few_bits is None or not self.drafter.copyable:
            return self.drafter
        model = self.drafter.twin(self._few_bits)
        if self._twin is None or self._twin.model is not model:
            if self._twin is not None:
                self._prefixes.forget(self._twin)
            self._twin = Forward(
                model,
                f"{self.drafter.name} ({self._few_bits})",
                self.drafter.attn_implementation,
                self.drafter.cuda_graphs,
            )
        return self._twin

    @property
    def memory(self) -> Memory:
        """What the models and the kept KV take right now; a running generation's KV not counted."""
        own = 0 if self.drafter is self.target else _weight_bytes(self.drafter.model)
        # Not self.draft_forward: asking must not quantize.
        twin = self._twin
        return Memory(
            target_weights=_weight_bytes(self.target.model),
            drafter_weights=own + (0 if twin is None else quantized_nbytes(twin.model)),
            kept_kv=self._prefixes.nbytes,
        )

    def clear_cache(self) -> None:
        """Free the KV that is kept for later prompts; files stay.

        To be called after weights were edited where nobody counts it, value by value: through
        ``.data`` or NumPy, or inside a quantized tensor. All else that is done to a model is seen
        (:class:`rapid_llm.engine.identity.ModelState`), and KV is then read again.
        """
        self._prefixes.clear()

    def keep_only(self, prompt: Prompt) -> int:
        """Free the kept KV, but for what the target has read of this prompt.

        Generations on one prompt then take equally long to begin, whatever came between them.
        Returns how many of the prompt's tokens are kept: whole chunks of a prefill, which a short
        prompt has none of.
        """
        ids = encode_prompt(prompt, self.tokenizer, self.chat_template_kwargs)
        return self._prefixes.keep_only(self.target, ids)

    def generate(
        self,
        target_prompt: Prompt | None,
        draft_prompt: Prompt | None = None,
        *,
        sampling: SamplingParams | None = None,
        speculation: SpeculationConfig | None = None,
        confidence: float = 1.0,
        progress: Progress | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> GenerationResult:
        """Answer a prompt; arguments and errors are those of :meth:`stream`."""
        chunks = self.stream(
            target_prompt,
            draft_prompt,
            sampling=sampling,
            speculation=speculation,
            confidence=confidence,
            progress=progress,
            chat_template_kwargs=chat_template_kwargs,
        )
        return GenerationResult.from_chunks(list(chunks))

    def stream(
        self,
        target_prompt: Prompt | None,
        draft_prompt: Prompt | None = None,
        *,
        sampling: SamplingParams | None = None,
        speculation: SpeculationConfig | None = None,
        confidence: float = 1.0,
        progress: Progress | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[Chunk]:
        """Answer a prompt, a chunk a round.

        Args:
            target_prompt: the whole context and the question: a string (taken as it is), chat
                messages (the model's template is applied) or token ids. None lets the drafter
                answer alone from its own prompt (plain RAG).
            draft_prompt: the retrieved context and the question. None decodes the target plainly.
            sampling: how tokens are drawn; greedy by default.
            speculation: how drafts are made and judged; not used without a draft prompt.
            confidence: in [0, 1], how sure the retrieval was; used with ``dynamic_eta``.
            progress: told how far the prompts have been read.
            chat_template_kwargs: variables of the chat template for this call, which go before
                the decoder's own of the same names.

        Raises:
            InvalidParameterError: neither prompt was given, or one is malformed, or the confidence
                is outside its range.
            ContextWindowError: the prompt to be answered leaves no room for a token in its model's
                window. Where it leaves some, ``max_new_tokens`` is cut to it, and
                ``stats.max_new_tokens`` says so; a draft prompt too long for the drafter is left
                out, and ``stats.draft_skipped`` says that.
            TokenizerMismatchError: the prompt to be answered has a token that its model has not.
            NumericalError: a model produced NaN (raised while streaming).
            GenerationTimeoutError: ``sampling.timeout`` seconds have passed since the call (raised
                while streaming, between two chunks of the prefill or after a round).
        """
        started = time.perf_counter()
        request = self._prepare(
            target_prompt,
            draft_prompt,
            sampling or SamplingParams(),
            speculation,
            confidence,
            self.chat_template_kwargs | checked_variables(chat_template_kwargs),
        )
        return self._run(request, started, progress)

    def log_likelihood(self, prompt: Prompt, continuation: str, *, drafter: bool = False) -> float:
        """The natural logarithm of the probability that the target continues a prompt so.

        Args:
            prompt: as for :meth:`stream`.
            continuation: text of at least one token, taken as it is.
            drafter: ask the drafter instead of the target.

        Raises:
            InvalidParameterError: the prompt is malformed, or the continuation has no tokens.
            ContextWindowError: both together exceed the model's window.
            NumericalError: the model produced NaN.
        """
        forward = self.drafter if drafter else self.target
        tokens = encode_literal(continuation, self.tokenizer)
        if not tokens:
            raise InvalidParameterError(
                f"continuation={continuation!r} has no tokens; give some text"
            )
        ids = encode_prompt(prompt, self.tokenizer, self.chat_template_kwargs)
        self._require_readable([*ids, *tokens], forward)
        if len(tokens) > (room := self._room(ids, forward)):
            raise ContextWindowError(
                f"the prompt of {len(ids)} tokens leaves room for {room} in the context window of "
                f"{forward.name}, {forward.context_window} tokens, and the continuation has "
                f"{len(tokens)}; shorten one of them"
            )
        with self._prefixes.lease(forward, ids, len(ids) + len(tokens)) as lease:
            total = _log_likelihood(Session(forward, lease.cache, ids), ids, tokens)
        if isnan(total):
            raise NumericalError(_NAN.format(name=forward.name))
        return total

    async def astream(
        self,
        target_prompt: Prompt | None,
        draft_prompt: Prompt | None = None,
        *,
        sampling: SamplingParams | None = None,
        speculation: SpeculationConfig | None = None,
        confidence: float = 1.0,
        progress: Progress | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[Chunk]:
        """:meth:`stream` for asyncio: the models run in a thread, the event loop stays free.

        Cancelling the task or closing the iterator stops the generation after the round (or the
        chunk of the prefill) that is under way. ``progress`` is called in that thread.
        """

        def start(check: Callable[[], None]) -> Iterator[Chunk]:
            def report(whose: Literal["draft", "target"], done: int, total: int) -> None:
                check()
                if progress is not None:
                    progress(whose, done, total)

            return self.stream(
                target_prompt,
                draft_prompt,
                sampling=sampling,
                speculation=speculation,
                confidence=confidence,
                progress=report,
                chat_template_kwargs=chat_template_kwargs,
            )

        async for chunk in iterate_in_thread(start):
            yield chunk

    def _prepare(
        self,
        target_prompt: Prompt | None,
        draft_prompt: Prompt | None,
        sampling: SamplingParams,
        speculation: SpeculationConfig | None,
        confidence: float,
        chat_template_kwargs: Mapping[str, Any],
    ) -> _Request:
        """Check everything that can be checked before a model runs."""
        sure = real(confidence)
        if sure is None or not 0 <= sure <= 1:
            raise InvalidParameterError(
                f"confidence={confidence!r} is not allowed: confidence must be within [0, 1]"
            )
        config = speculation or SpeculationConfig()
        method: Method = "lc"
        forward, own_prompt = self.target, config.drafting == "rag"
        if target_prompt is None:
            if draft_prompt is None:
                raise InvalidParameterError(
                    "target_prompt and draft_prompt are both None; give at least one prompt"
                )
            method, forward = "rag", self.drafter
            target_prompt, draft_prompt = draft_prompt, None
        elif draft_prompt is not None or not own_prompt:
            method = "rapid" if config.transfer_strength > 0 else "sd"
        if method in DRAFTED and config.drafting in compressed.DRAFTERS:
            compressed.require_compressible(forward, config.drafting)
        prompt = encode_prompt(target_prompt, self.tokenizer, chat_template_kwargs)
        self._require_readable(prompt, forward)
        new = min(sampling.max_new_tokens, self._room(prompt, forward))
        draft: list[int] = []
        draft_skipped = NO_DRAFT_PROMPT if method == "lc" else None
        if draft_prompt is not None and own_prompt:
            draft = encode_prompt(draft_prompt, self.tokenizer, chat_template_kwargs)
            draft_skipped = self._unreadable(draft, self.drafter)
            if draft_skipped is None and len(draft) >= (window := self.drafter.context_window):
                draft_skipped = (
                    f"has {len(draft)} tokens, the context window of {self.drafter.name} {window}"
                )
            if draft_skipped is not None:
                draft_skipped = f"the draft prompt {draft_skipped}"
                draft, method = [], "lc"
        settings = generation_config(forward.model)
        stop = settings.stop_strings or ()
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        return _Request(
            prompt=prompt,
            draft_prompt=draft,
            draft_skipped=draft_skipped,
            forward=forward,
            sampling=replace(sampling, max_new_tokens=new, stop=(*sampling.stop, *stop)),
            ends=frozenset() if sampling.ignore_eos else self._ends(settings),
            least_new_tokens=least_new_tokens(settings, len(prompt)),
            config=config,
            confidence=sure,
            method=method,
        )

    @contextmanager
    def _open(self, request: _Request) -> Iterator[_Generation]:
        """Sessions for a request, which begin with what was read before and are kept after it."""
        with ExitStack() as leases:

            def lease(forward: Forward, prompt: Sequence[int]) -> tuple[Session, Lease]:
                length, new = len(prompt), request.sampling.max_new_tokens
                capacity = max(min(length + new, forward.context_window), length + ROOM)
                borrowed = leases.enter_context(
                    self._prefixes.lease(forward, prompt, forward.capacity_for(capacity))
                )
                return Session(forward, borrowed.cache, prompt), borrowed

            target, kept = lease(request.forward, request.prompt)
            forward = request.forward
            sampler = Sampler(request.sampling, request.prompt, forward.device, forward.model)
            yield _Generation(
                target=target,
                prompt=request.prompt,
                cached=kept.reused,
                drafters=self._drafters(request, target, sampler, lease),
                drafter_name=self.drafter.name,
                sampler=sampler,
                config=request.config,
                confidence=request.confidence,
                method=request.method,
                draft_skipped=request.draft_skipped,
            )

    def _drafters(
        self,
        request: _Request,
        target: Session,
        sampler: Sampler,
        lease: Callable[[Forward, Sequence[int]], tuple[Session, Lease]],
    ) -> list[Drafter]:
        """None, one, or two to choose from in each round."""
        config, forward = request.config, request.forward
        if request.method not in DRAFTED:
            return []
        if config.drafting == "rest":
            return [LookupDrafter(request.prompt, forward.vocab_size, forward.device)]
        if config.drafting in compressed.DRAFTERS:
            own = self.draft_forward if self.drafter is self.target else forward
            drafter = compressed.DRAFTERS[config.drafting]
            return [drafter(target, own, request.prompt, sampler, config)]
        session, _ = lease(self.draft_forward, request.draft_prompt)
        if self.drafter.device != forward.device:
            device, model = self.drafter.device, forward.model
            sampler = Sampler(request.sampling, request.prompt, device, model, stream=1)
        rag = RagDrafter(
            session,
            request.draft_prompt,
            sampler,
            forward.vocab_size,
            config,
            request.prompt,
            self._unshared,
        )
        if not (config.lookup and config.gamma == "auto" and config.applied_mode == "exact"):
            return [rag]
        # Where nothing is transferred, any guess will do that the target accepts.
        lookup = LookupDrafter(request.prompt, forward.vocab_size, forward.device, CERTAIN)
        return [lookup, rag]

    def _ends(self, settings: GenerationConfig) -> frozenset[int]:
        """Every id that ends an answer: the model's, the tokenizer's, the chat template's."""
        own = settings.eos_token_id
        ids = [own] if own is None or isinstance(own, int) else list(own)
        ids += [self.tokenizer.eos_token_id, self._end_of_turn]
        return frozenset(i for i in ids if i is not None)

    def _unreadable(self, prompt: Sequence[int], forward: Forward) -> str | None:
        """Which token of a prompt a model does not have, for messages; None if it has all."""
        embedded = forward.model.get_input_embeddings().weight.shape[0]
        unshared = self._unshared if forward is not self.target else frozenset()
        unknown = (i for i in prompt if i >= embedded or i in unshared)
        if (found := next(unknown, None)) is None:
            return None
        token = self.tokenizer.convert_ids_to_tokens(found)
        return f"holds {token!r}, which {forward.name} does not have"

    def _require_readable(self, prompt: Sequence[int], forward: Forward) -> None:
        if (reason := self._unreadable(prompt, forward)) is not None:
            raise TokenizerMismatchError(
                f"the prompt {reason}; take it out of the prompt, or take a model that was given "
                "embeddings for all tokens of the tokenizer (resize_token_embeddings)"
            )

    def _room(self, prompt: Sequence[int], forward: Forward) -> int:
        """Tokens that a model's window leaves for the answer, at least 1."""
        window = forward.context_window
        if len(prompt) >= window:
            raise ContextWindowError(
                f"the prompt has {len(prompt)} tokens, the context window of {forward.name} "
                f"{window}, and the answer needs at least one; shorten the prompt by "
                f"{len(prompt) + 1 - window} tokens, or truncate the document"
            )
        return window - len(prompt)

    def _run(self, request: _Request, started: float, progress: Progress | None) -> Iterator[Chunk]:
        """Rounds until the answer ends. Only the steps run in inference mode, never the caller."""
        sampling = request.sampling
        text = TextStream(self.tokenizer, sampling.stop)

        def report(whose: Literal["draft", "target"], done: int, total: int) -> None:
            _require_time(sampling, started, 0)
            if progress is not None:
                progress(whose, done, total)

        with self._open(request) as generation:
            stats = generation.stats
            stats.max_new_tokens = sampling.max_new_tokens
            try:
                generation.prefill(report)
            except torch.OutOfMemoryError:
                self.clear_cache()
                generation.prefill(report)  # goes on where it stopped

            finish: FinishReason | None = None
            while finish is None:
                new: list[int] = []
                pieces: list[str] = []
                for token in generation.round():
                    new.append(token)
                    said = stats.completion_tokens + len(new)
                    if token in request.ends and said > request.least_new_tokens:
                        finish = "stop"
                        break
                    pieces.append(text.push(token))
                    if text.stopped:
                        finish = "stop"
                        break
                    if said == sampling.max_new_tokens:
                        finish = "length"
                        break
                if finish is not None:
                    pieces.append(text.finish())
                    finish = "stop" if text.stopped else finish
                generation.keep(new)
                if stats.time_to_first_token is None:
                    stats.time_to_first_token = time.perf_counter() - started
                if finish is None:
                    _require_time(sampling, started, stats.completion_tokens)
                yield Chunk("".join(pieces), tuple(new), finish, replace(stats))

    def _resolve(self, quantization: str | None) -> FewBits | None:
        """The kind of weights to draft with, None for the drafter's own."""
        if quantization not in (None, *get_args(Quantization)):
            raise InvalidParameterError(
                f"drafter_quantization={quantization!r} is unknown; "
                "use 'auto', 'int8', 'int4' or None"
            )
        if quantization == "auto":
            return self.drafter.cheapest if self.drafter is self.target else None
        for kind in get_args(FewBits):
            if quantization == kind:
                self.drafter.require(kind)
                return kind
        return None

    def _check_tokenizers(
        self, drafter_tokenizer: PreTrainedTokenizerBase | None
    ) -> frozenset[int]:
        """Ids of added tokens that only one of the models has; any other difference is refused."""
        target, drafter = self.target, self.drafter
        if drafter_tokenizer is None:
            if drafter.vocab_size != target.vocab_size:
                raise TokenizerMismatchError(
                    f"the drafter {drafter.name} has a vocabulary of {drafter.vocab_size}, the "
                    f"target {target.name} of {target.vocab_size}; take a drafter of the same "
                    "family, or pass drafter_tokenizer= if only the padding differs"
                )
            return frozenset()
        ours, theirs = self.tokenizer.get_vocab(), drafter_tokenizer.get_vocab()
        if ours == theirs:
            return frozenset()
        either = dict(ours.items() ^ theirs.items())  # tokens that not both have, at one id
        added = self.tokenizer.get_added_vocab() | drafter_tokenizer.get_added_vocab()
        ids = Counter((ours | theirs).values())
        for token, i in either.items():
            if (token in ours and token in theirs) or token not in added or ids[i] > 1:
                raise TokenizerMismatchError(
                    f"the tokenizers of {target.name} ({len(ours)} tokens) and {drafter.name} "
                    f"({len(theirs)} tokens) differ, for example in {token!r}, and not only in "
                    "tokens that were added; take a drafter that shares the target's tokenizer"
                )
        return frozenset(either.values())


class _Request(NamedTuple):
    """A checked call. ``draft_prompt`` is empty where nothing drafts, or without a prompt.

    ``method`` is what is asked for; where nothing can be drafted, ``draft_skipped`` says why.
    """

    prompt: list[int]
    draft_prompt: list[int]
    draft_skipped: str | None
    forward: Forward
    sampling: SamplingParams
    ends: frozenset[int]
    least_new_tokens: int
    config: SpeculationConfig
    confidence: float
    method: Method


@dataclass
class _Source:
    """A drafter, how many tokens are to be had of it, and where its last draft ended."""

    drafter: Drafter
    schedule: Schedule
    drafted: int = 0

    def missed(self, said: int) -> int:
        """Tokens of the answer after that draft, all of which the drafter must read first."""
        return max(0, said - self.drafted)


class _Generation:
    """One generation: the target's session, its drafters, and the output so far."""

    def __init__(
        self,
        target: Session,
        prompt: Sequence[int],
        cached: int,
        drafters: Sequence[Drafter],
        drafter_name: str,
        sampler: Sampler,
        config: SpeculationConfig,
        confidence: float,
        method: Method,
        draft_skipped: str | None,
    ) -> None:
        self.target = target
        self.sampler = sampler
        self.config = config
        self._confidence = confidence
        self._method = method
        self._prompt = list(prompt)
        self._output: list[int] = []
        self._drafter_name = drafter_name
        self._drafters = drafters
        self._sources: list[_Source] = []
        self.stats = Stats(
            method="lc" if method in DRAFTED else method,
            prompt_tokens=len(self._prompt),
            cached_tokens=cached,
            draft_prompt_tokens=sum(drafter.prompt_tokens for drafter in drafters),
            draft_skipped=NOTHING_PAID if method in DRAFTED else draft_skipped,
        )

    @torch.inference_mode()
    def prefill(self, progress: Progress | None) -> None:
        """Read both prompts, all but their last tokens: the first round reads those."""
        started = time.perf_counter()
        self.target.prefill(
            self._prompt[:-1], progress and (lambda *tokens: progress("target", *tokens))
        )
        for drafter in self._drafters:
            drafter.prefill(progress and (lambda *tokens: progress("draft", *tokens)))
        gamma = self.config.gamma
        schedules: list[Schedule] = []
        if gamma != "auto":
            schedules = [FixedSchedule(gamma) for _ in self._drafters]
        elif self._drafters:
            cost, always = pass_cost(self.target), self.config.transfer_strength > 0
            schedules = [
                AdaptiveSchedule(cost, drafter.cost(), drafter.belief, always=always)
                for drafter in self._drafters
            ]
        self._sources = list(map(_Source, self._drafters, schedules))
        self.target.forward.synchronize()  # or the first round would be charged with the prefill
        self.stats.prefill_seconds = time.perf_counter() - started

    @torch.inference_mode()
    def round(self) -> list[int]:
        """Draft, verify, accept: one pass of the target; between 1 and γ+1 tokens."""
        started = time.perf_counter()
        draft, schedule = self._draft()
        self.stats.draft_seconds += time.perf_counter() - started

        # Position i of the draft is judged by the logits that follow token i - 1.
        logits = self.target.extend(torch.cat([self._pending(), draft.tokens]))
        s = self.sampler.scores(logits, draft.tokens)
        q = draft.probabilities
        strength = self.config.transfer_strength
        eta: float | Tensor = strength
        if self.config.dynamic_eta and strength > 0:
            eta = dynamic_eta(strength, self._confidence, len(self._output), q)
        if self.sampler.params.greedy:
            accepted, token = verify_greedy(s, q, draft.tokens, self.config, eta)
        else:
            accepted, token = verify_sampled(
                s, q, draft.tokens, self.config, self.sampler.generator, eta
            )

        broken = torch.stack([logits.sum().isnan(), q.sum().isnan()]).long()
        verdict = torch.cat([accepted[None], token[None], broken, draft.tokens])
        n, last, target_nan, drafter_nan, *drafted = verdict.tolist()  # the one host sync
        if target_nan or drafter_nan:
            name = self.target.forward.name if target_nan else self._drafter_name
            raise NumericalError(_NAN.format(name=name))
        self.stats.rounds += 1
        self.stats.drafted_tokens += len(drafted)
        self.stats.accepted_tokens += n
        self.stats.rejections += n < len(drafted)
        self.stats.draft_passes += draft.passes
        if drafted:
            self.stats.method, self.stats.draft_skipped = self._method, None
        if schedule is not None:
            schedule.record(len(drafted), n, draft.passes)
        self.stats.decode_seconds += time.perf_counter() - started
        return [*drafted[:n], last]

    def keep(self, tokens: Sequence[int]) -> None:
        """Append a round's tokens, as many as the answer takes, and forget the rest."""
        self._output += tokens
        self.stats.completion_tokens = len(self._output)
        self.sampler.commit(tokens)
        self.target.rollback(len(self._prompt) + len(self._output) - 1)

    def _pending(self) -> Tensor:
        """The tokens that the target has not read: the last one, on the target's device."""
        return self.target.forward.tensor(self._output[-1:] or self._prompt[-1:])

    def _draft(self) -> tuple[Draft, Schedule | None]:
        """A proposal, on the target's device, of the drafter that promises most and has one.

        It is empty, and of no schedule, without a drafter or where none is worth its time.
        """
        device = self.target.forward.device
        # Even the last token is drafted, so that every one follows the mode's law.
        remaining = self.sampler.params.max_new_tokens - len(self._output)
        # Not across a length at which all would be read again, and once more if it is rejected.
        remaining = min(remaining, max(1, self.target.room - 1))
        look_ahead = self.config.applied_mode == "augmented"
        said = len(self._output)

        def promise(source: _Source) -> float:
            return source.schedule.speedup(source.missed(said))

        for source in sorted(self._sources, key=promise, reverse=True):
            gamma = min(source.schedule.next(source.missed(said)), remaining)
            if gamma + look_ahead == 0:
                continue
            draft = source.drafter.draft(self._output, gamma, look_ahead=look_ahead)
            if len(draft.probabilities) > 0:
                source.drafted = said + len(draft.tokens)
                q = draft.probabilities.to(device)
                return Draft(draft.tokens.to(device), q, draft.passes), source.schedule
        nothing = torch.empty(0, dtype=torch.long, device=device)
        vocab_size = self.target.forward.vocab_size
        q = torch.empty(0, vocab_size, dtype=torch.float32, device=device)
        return Draft(nothing, q, passes=0), None


@torch.inference_mode()
def _log_likelihood(session: Session, prompt: list[int], continuation: list[int]) -> float:
    session.prefill(prompt[:-1])
    device = session.forward.device
    logits = session.extend(torch.tensor([prompt[-1], *continuation[:-1]], device=device))
    wanted = torch.tensor(continuation, device=device)
    return -F.cross_entropy(logits, wanted, reduction="sum").item()


def _require_time(sampling: SamplingParams, started: float, tokens: int) -> None:
    if sampling.timeout is not None and time.perf_counter() - started > sampling.timeout:
        raise GenerationTimeoutError(
            f"timeout={sampling.timeout:g} s passed after {tokens} of at most "
            f"{sampling.max_new_tokens} tokens: raise the timeout, lower max_new_tokens, or "
            "shorten the prompt"
        )


def _name_of(model: PreTrainedModel) -> str:
    return getattr(model, "name_or_path", "") or type(model).__name__


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
