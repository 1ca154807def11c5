"""RapidLLM: text completion without a chat template."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    CallbackManager,
    CallbackManagerForLLMRun,
    Callbacks,
)
from langchain_core.documents import Document
from langchain_core.language_models import BaseLLM, LangSmithParams, LanguageModelInput
from langchain_core.outputs import GenerationChunk, LLMResult
from pydantic import ConfigDict, PrivateAttr, model_validator
from rapid_llm.aio import in_thread
from rapid_llm.errors import InvalidParameterError
from typing_extensions import Self

from langchain_rapid.answers import response_metadata, usage
from langchain_rapid.batches import Batches, aanswers_of, answers_of
from langchain_rapid.options import Call
from langchain_rapid.runs import child_of
from langchain_rapid.settings import VERSION, RapidModel

if TYPE_CHECKING:
    from rapid_llm.decoder import Delta


class RapidLLM(RapidModel, Batches[LanguageModelInput, str], BaseLLM):
    """LLM that completes text; no chat template is applied (use ``ChatRapid`` for that).

    Control tokens in a prompt, which inserted documents may contain, are ordinary text, unless
    ``formatted=True`` marks the prompt as finished.

    The prompt is the target's. The drafter's comes from :func:`create_rapid_documents_chain`, from
    ``retriever=`` and ``documents=`` (the prompt is the question), or from ``draft_prompt=`` of a
    call. Fields and overrides are those of ``ChatRapid``. Metadata of an answer are in
    ``generate(...).generations[i][0].generation_info``.

    Raises:
        pydantic.ValidationError: an unknown field, or a value outside its range.
        RapidError: when called, as for ``ChatRapid``.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    formatted: bool = False
    """Whether prompts are finished: their control tokens steer the model, those of an inserted
    document too. A call may override it."""

    if TYPE_CHECKING:

        def __init__(self, **fields: Any) -> None: ...

    _of_call: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _set_rapid_llm_version(self) -> Self:
        self._add_version("langchain-rapid", VERSION)
        return self

    @model_validator(mode="after")
    def _forbid_cache_with_retriever(self) -> Self:
        # LangChain reads the cache before it calls an LLM, so that chunks retrieved by the call
        # could not be part of the key.
        if self.retriever is not None:
            if self.cache not in (None, False):
                raise InvalidParameterError(
                    "RapidLLM with retriever= cannot be cached, because what is retrieved would "
                    "not be part of the key; use ChatRapid or create_rapid_documents_chain"
                )
            self.cache = False
        return self

    @property
    def _llm_type(self) -> str:
        return "rapid"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return super()._identifying_params | {"formatted": self.formatted} | self._of_call

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return self._tracing_params("llm", stop, kwargs)

    # --- the cache key -------------------------------------------------------------------------
    # LangChain builds an LLM's key from its identifying parameters, without arguments of the call
    # such as the draft.

    def generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """LangChain's method, with the arguments of the call in the cache key."""
        return super(RapidLLM, self._called_with(kwargs)).generate(
            prompts, stop, callbacks, **kwargs
        )

    async def agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        callbacks: Callbacks | list[Callbacks] | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        """:meth:`generate` for asyncio."""
        return await super(RapidLLM, self._called_with(kwargs)).agenerate(
            prompts, stop, callbacks, **kwargs
        )

    def _called_with(self, kwargs: dict[str, Any]) -> Self:
        of_run = ("tags", "metadata", "run_name", "run_id")
        keyed = self.model_copy()  # shares the loaded models
        keyed._of_call = {name: value for name, value in kwargs.items() if name not in of_run}
        return keyed

    # --- generation ----------------------------------------------------------------------------

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        for chunk in self._completed(prompt, stop, run_manager, kwargs):
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        async for chunk in self._acompleted(prompt, stop, run_manager, kwargs):
            if run_manager is not None:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        def complete(prompt: str) -> list[GenerationChunk]:
            return list(self._completed(prompt, stop, run_manager, kwargs))

        return _result(answers_of(prompts, complete))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        async def complete(prompt: str) -> list[GenerationChunk]:
            chunks = self._acompleted(prompt, stop, run_manager, kwargs)
            return [chunk async for chunk in chunks]

        return _result(await aanswers_of(prompts, complete))

    def _completed(
        self,
        prompt: str,
        stop: list[str] | None,
        run_manager: CallbackManagerForLLMRun | None,
        kwargs: dict[str, Any],
    ) -> Iterator[GenerationChunk]:
        if self._retrieves(kwargs):
            found_chunks = self._retrieve(prompt, child_of(run_manager, CallbackManager))
            prompt, found = self._with_contexts(prompt, found_chunks, kwargs)
            kwargs = kwargs | found
        draft, call = self._draft_and_call(stop, kwargs)
        for chunk in self._run(prompt, draft, call):
            if chunk.text or chunk.finish_reason:
                yield _generation_chunk(chunk, call)

    async def _acompleted(
        self,
        prompt: str,
        stop: list[str] | None,
        run_manager: AsyncCallbackManagerForLLMRun | None,
        kwargs: dict[str, Any],
    ) -> AsyncIterator[GenerationChunk]:
        if self._retrieves(kwargs):
            child = child_of(run_manager, AsyncCallbackManager)
            found_chunks = await self._aretrieve(prompt, child)
            prompt, found = await in_thread(
                partial(self._with_contexts, prompt, found_chunks, kwargs)
            )
            kwargs = kwargs | found
        draft, call = self._draft_and_call(stop, kwargs)
        async for chunk in self._arun(prompt, draft, call):
            if chunk.text or chunk.finish_reason:
                yield _generation_chunk(chunk, call)

    def _retrieves(self, kwargs: dict[str, Any]) -> bool:
        given = kwargs.get("draft_prompt") is not None or kwargs.get("retrieved") is not None
        if self.retriever is None or given:
            return False
        if self._is_formatted(kwargs):
            raise InvalidParameterError(
                "formatted=True was given with retriever=, which puts documents around the prompt, "
                "so that it cannot be a finished one: leave out one of them"
            )
        return True

    def _is_formatted(self, kwargs: dict[str, Any]) -> bool:
        given = kwargs.get("formatted")
        return self.formatted if given is None else bool(given)

    def _with_contexts(
        self, question: str, chunks: list[Document], arguments: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        contexts = self._contexts(chunks, question, arguments)
        found = dict(contexts.found)
        if contexts.draft is not None:
            found["draft_prompt"] = f"{contexts.draft}\n\nAnswer:"
        return f"{contexts.target}\n\nAnswer:", found

    def _draft_and_call(
        self, stop: list[str] | None, kwargs: dict[str, Any]
    ) -> tuple[str | None, Call]:
        options = dict(kwargs)
        draft: str | None = options.pop("draft_prompt", None)
        options.pop("formatted", None)
        return draft, self._call(stop, options)._replace(formatted=self._is_formatted(kwargs))


def _generation_chunk(chunk: Delta, call: Call) -> GenerationChunk:
    if chunk.finish_reason is None:
        return GenerationChunk(text=chunk.text)
    info = response_metadata(chunk, call) | {"usage_metadata": usage(chunk.stats)}
    return GenerationChunk(text=chunk.text, generation_info=info)


def _result(answers: list[list[GenerationChunk]]) -> LLMResult:
    generations = []
    totals = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    for chunks in answers:
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole += chunk
        generations.append([whole])
        counts = (whole.generation_info or {})["usage_metadata"]
        totals["prompt_tokens"] += counts["input_tokens"]
        totals["completion_tokens"] += counts["output_tokens"]
        totals["total_tokens"] += counts["total_tokens"]
    return LLMResult(generations=generations, llm_output={"token_usage": totals})
