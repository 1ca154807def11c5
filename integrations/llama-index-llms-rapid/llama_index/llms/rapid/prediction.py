"""``predict`` and ``structured_predict``, with which engines fill and answer templates."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Generator
from typing import Any, cast

from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.llm import (
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictInProgressEvent,
    LLMStructuredPredictStartEvent,
)
from llama_index.core.llms.llm import LLM
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.program.utils import FlexibleModel
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.types import Model, PydanticProgramMode, TokenAsyncGen

from llama_index.llms.rapid.objects import aanswered, answered, astreamed, streamed
from llama_index.llms.rapid.structured_llm import StructuredRapidLLM
from rapid_llm.aio import in_thread

dispatcher = get_dispatcher(__name__)


class Predictions(LLM):
    """An LLM whose ``chat`` enforces a ``response_format``, used for structured predictions.

    With a ``pydantic_program_mode`` other than the default, LlamaIndex's methods are used.
    """

    # LlamaIndex's methods are unwrapped, because these already have instrumentation spans.

    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        """Fill a template and answer it; the model is loaded in a thread, not in the event loop."""
        await in_thread(lambda: self.metadata)
        return cast(str, await inspect.unwrap(LLM.apredict)(self, prompt, **prompt_args))

    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        """:meth:`apredict` as a stream of texts."""
        await in_thread(lambda: self.metadata)
        return cast(TokenAsyncGen, await inspect.unwrap(LLM.astream)(self, prompt, **prompt_args))

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Fill a template and answer it with an object.

        Args:
            output_cls: pydantic class of the object.
            prompt: the template.
            llm_kwargs: arguments of ``chat``.
            prompt_args: arguments of the template.

        Raises:
            PipelineError: the schema of the class cannot be enforced, the answer was cut, or the
                call failed.
            pydantic.ValidationError: a validator of the class, which is not part of its schema,
                refuses the answer.
        """
        if not self._holds:
            usual = inspect.unwrap(LLM.structured_predict)
            return cast(Model, usual(self, output_cls, prompt, llm_kwargs, **prompt_args))
        _begin(output_cls, prompt, prompt_args)
        messages = self._get_messages(prompt, **prompt_args)
        answer = answered(self, output_cls, messages, llm_kwargs)
        dispatcher.event(LLMStructuredPredictEndEvent(output=answer))
        return answer

    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """:meth:`structured_predict` without blocking the event loop."""
        await in_thread(lambda: self.metadata)
        if not self._holds:
            usual = inspect.unwrap(LLM.astructured_predict)
            return cast(Model, await usual(self, output_cls, prompt, llm_kwargs, **prompt_args))
        _begin(output_cls, prompt, prompt_args)
        messages = self._get_messages(prompt, **prompt_args)
        answer = await aanswered(self, output_cls, messages, llm_kwargs)
        dispatcher.event(LLMStructuredPredictEndEvent(output=answer))
        return answer

    def stream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Model | FlexibleModel, None, None]:
        """:meth:`structured_predict` as a stream of partial objects, the last one complete.

        A partial object that is not valid for the class is of a class with the same fields, None
        where they are missing.
        """
        if not self._holds:
            usual = inspect.unwrap(LLM.stream_structured_predict)
            yield from usual(self, output_cls, prompt, llm_kwargs, **prompt_args)
            return
        _begin(output_cls, prompt, prompt_args)
        messages, known = self._get_messages(prompt, **prompt_args), None
        for known in streamed(self, output_cls, messages, llm_kwargs):
            dispatcher.event(LLMStructuredPredictInProgressEvent(output=known))
            yield known
        dispatcher.event(LLMStructuredPredictEndEvent(output=known))

    async def astream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Model | FlexibleModel, None]:
        """:meth:`stream_structured_predict` without blocking the event loop."""
        await in_thread(lambda: self.metadata)
        if not self._holds:
            usual = inspect.unwrap(LLM.astream_structured_predict)
            return cast(Any, await usual(self, output_cls, prompt, llm_kwargs, **prompt_args))
        _begin(output_cls, prompt, prompt_args)
        messages = self._get_messages(prompt, **prompt_args)

        async def objects() -> AsyncGenerator[Model | FlexibleModel, None]:
            known: Any = None
            async for known in astreamed(self, output_cls, messages, llm_kwargs):
                dispatcher.event(LLMStructuredPredictInProgressEvent(output=known))
                yield known
            dispatcher.event(LLMStructuredPredictEndEvent(output=known))

        return objects()

    def as_structured_llm(self, output_cls: type[BaseModel], **kwargs: Any) -> StructuredLLM:
        """An LLM whose answers are objects of a class, and which drafts in engines like this one.

        Args:
            output_cls: pydantic class of the objects.
            kwargs: other fields of LlamaIndex's ``StructuredLLM``.
        """
        if not self._holds:
            return super().as_structured_llm(output_cls, **kwargs)
        return StructuredRapidLLM(llm=self, output_cls=output_cls, **kwargs)

    @property
    def _holds(self) -> bool:
        return self.pydantic_program_mode == PydanticProgramMode.DEFAULT


def _begin(
    output_cls: type[BaseModel], prompt: BasePromptTemplate, prompt_args: dict[str, Any]
) -> None:
    dispatcher.event(
        LLMStructuredPredictStartEvent(
            output_cls=output_cls, template=prompt, template_args=prompt_args
        )
    )
