"""Structured output: answers of a chat that are objects of a pydantic class."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.llms.llm import LLM
from llama_index.core.program.utils import FlexibleModel, create_flexible_model
from llama_index.core.types import Model

from llama_index.llms.rapid.answers import from_partial_json
from llama_index.llms.rapid.templates import not_swallowed
from rapid_llm.errors import InvalidParameterError


def answered(
    llm: LLM,
    output_cls: type[Model],
    messages: Sequence[ChatMessage],
    options: Mapping[str, Any] | None = None,
) -> Model:
    """Answer messages with an object.

    Args:
        llm: LLM whose ``chat`` takes a ``response_format``.
        output_cls: pydantic class of the object.
        messages: the messages.
        options: other arguments of ``chat``.

    Raises:
        InvalidParameterError: the schema of the class cannot be enforced, or the answer was cut;
            for messages of a template it is the cause of a :class:`PipelineError`.
        pydantic.ValidationError: a validator of the class, which is not part of its schema, refuses
            the answer.
    """
    return whole(llm.chat(messages, **_arguments(output_cls, options)), output_cls, messages)


async def aanswered(
    llm: LLM,
    output_cls: type[Model],
    messages: Sequence[ChatMessage],
    options: Mapping[str, Any] | None = None,
) -> Model:
    """:func:`answered` without blocking the event loop."""
    response = await llm.achat(messages, **_arguments(output_cls, options))
    return whole(response, output_cls, messages)


def streamed(
    llm: LLM,
    output_cls: type[Model],
    messages: Sequence[ChatMessage],
    options: Mapping[str, Any] | None = None,
) -> Generator[Model | FlexibleModel, None, None]:
    """:func:`answered` as a stream of partial objects, of which the last is complete.

    A partial object that is not valid for the class is of a class with the same fields, None where
    they are missing.
    """
    growing, response = Growing(output_cls), None
    responses = llm.stream_chat(messages, **_arguments(output_cls, options))
    with closing(responses):
        for response in responses:
            if (known := growing.push(response)) is not None:
                yield known
    assert response is not None
    yield whole(response, output_cls, messages)


async def astreamed(
    llm: LLM,
    output_cls: type[Model],
    messages: Sequence[ChatMessage],
    options: Mapping[str, Any] | None = None,
) -> AsyncGenerator[Model | FlexibleModel, None]:
    """:func:`streamed` without blocking the event loop."""
    growing, response = Growing(output_cls), None
    responses = await llm.astream_chat(messages, **_arguments(output_cls, options))
    async with aclosing(responses):
        async for response in responses:
            if (known := growing.push(response)) is not None:
                yield known
    assert response is not None
    yield whole(response, output_cls, messages)


def texts(
    llm: LLM, output_cls: type[BaseModel], messages: Sequence[ChatMessage]
) -> Generator[str, None, None]:
    """:func:`streamed` as the pieces of the object's JSON."""
    response = None
    with closing(llm.stream_chat(messages, **_arguments(output_cls, None))) as responses:
        for response in responses:
            if response.delta:
                yield response.delta
    assert response is not None
    whole(response, output_cls, messages)


async def atexts(
    llm: LLM, output_cls: type[BaseModel], messages: Sequence[ChatMessage]
) -> AsyncGenerator[str, None]:
    """:func:`texts` without blocking the event loop."""
    response = None
    responses = await llm.astream_chat(messages, **_arguments(output_cls, None))
    async with aclosing(responses):
        async for response in responses:
            if response.delta:
                yield response.delta
    assert response is not None
    whole(response, output_cls, messages)


def _arguments(output_cls: type[BaseModel], options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**(options or {}), "response_format": response_format(output_cls)}


def require_class(output_cls: Any) -> None:
    """Raise InvalidParameterError if it is no pydantic class."""
    if not (isinstance(output_cls, type) and issubclass(output_cls, BaseModel)):
        raise InvalidParameterError(f"output_cls={output_cls!r} is no pydantic class: pass one")


def response_format(output_cls: type[BaseModel]) -> dict[str, Any]:
    """Response format of OpenAI for objects of a class."""
    require_class(output_cls)
    from rapid_llm.tools.definitions import closed

    described = {"name": output_cls.__name__, "schema": closed(output_cls.model_json_schema())}
    return {"type": "json_schema", "json_schema": described}


def whole(
    response: ChatResponse, output_cls: type[Model], messages: Sequence[ChatMessage]
) -> Model:
    """The object of a finished answer."""
    if isinstance(response.raw, dict) and response.raw["finish_reason"] == "length":
        with not_swallowed(messages):
            raise InvalidParameterError(
                f"the answer was cut before the {output_cls.__name__} was complete: raise "
                "max_tokens"
            )
    return output_cls.model_validate_json(response.message.content or "")


class Growing:
    """Partial objects of a class from an answer that is still streaming.

    Args:
        output_cls: the class.
    """

    def __init__(self, output_cls: type[BaseModel]) -> None:
        self._wanted, self._flexible = output_cls, create_flexible_model(output_cls)
        self._known: Any = None

    def push(self, response: ChatResponse) -> Any:
        """The partial object; None if it has not changed, or the answer is finished."""
        finished = isinstance(response.raw, dict) and response.raw["finish_reason"] is not None
        known = from_partial_json(response.message.content or "")
        if finished or known == self._known or not isinstance(known, dict):
            return None
        self._known = known
        try:
            return self._wanted.model_validate(known)
        except Exception:  # a validator may fail in any way on half a value
            return self._flexible.model_validate(known)
