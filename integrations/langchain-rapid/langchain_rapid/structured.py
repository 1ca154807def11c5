"""Structured output: a schema bound to a chat model, and the parser of its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import (
    BaseCumulativeTransformOutputParser,
    JsonOutputParser,
    PydanticOutputParser,
)
from langchain_core.output_parsers.openai_tools import (
    JsonOutputKeyToolsParser,
    PydanticToolsParser,
)
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.runnables.base import RunnableBinding
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import (
    convert_to_json_schema,
    convert_to_openai_tool,
)
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel
from rapid_llm.errors import InvalidParameterError

from langchain_rapid.tools import as_openai_choice, as_openai_tools, is_json, taken_options

if TYPE_CHECKING:
    from langchain_core.language_models import LanguageModelInput

Method: TypeAlias = Literal["json_schema", "function_calling", "json_mode"]
ToolLike: TypeAlias = "Mapping[str, Any] | type | Callable[..., Any] | BaseTool"

_METHODS = ("json_schema", "function_calling", "json_mode")


class BoundChatRapid(RunnableBinding[Any, AIMessage]):  # type: ignore[no-redef]
    """A ``ChatRapid`` with bound arguments, kept when tools or a schema are bound too.

    LangChain's binding would call ``bind_tools`` and ``with_structured_output`` of the model, so
    that the bound arguments, such as the draft, would be lost.
    """

    @classmethod
    def lc_id(cls) -> list[str]:
        """Id of LangChain's binding, as which this class is serialised."""
        return [*cls.get_lc_namespace(), "RunnableBinding"]

    def bind_tools(
        self,
        tools: Sequence[ToolLike],
        *,
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """:meth:`ChatRapid.bind_tools`, in addition to the bound arguments."""
        return self.bind(**bound_tools(tools, tool_choice, parallel_tool_calls, strict), **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """:meth:`ChatRapid.with_structured_output`, in addition to the bound arguments."""
        return structured(
            self, schema, method=method, include_raw=include_raw, strict=strict, kwargs=kwargs
        )


class _Whole(BaseCumulativeTransformOutputParser[Any]):
    """A parser that refuses answers that were cut; LangChain would complete their JSON.

    It refuses calls of other tools too, which LangChain would take for an empty text.
    """

    parser: Any
    of_text: bool

    def parse(self, text: str) -> Any:
        return self.parser.parse(text)

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        for generation in result:
            message = generation.message if isinstance(generation, ChatGeneration) else None
            reason = message and message.response_metadata.get("finish_reason")
            if self.of_text and isinstance(message, AIMessage) and reason == "tool_calls":
                names = ", ".join(call["name"] for call in message.tool_calls)
                raise OutputParserException(
                    f"the model called {names} instead of answering in the schema: leave the tools "
                    "out, or pass include_raw=True, make the calls of 'raw', and ask again"
                )
            if reason == "length" or (reason == "stop" and not is_json(generation.text)):
                raise OutputParserException(
                    "the answer was cut before its JSON was complete: raise max_tokens, or leave "
                    "out the stop string that it contains",
                    llm_output=generation.text,
                )
        return self.parser.parse_result(result, partial=partial)


def bound_tools(
    tools: Sequence[ToolLike],
    tool_choice: Any = None,
    parallel_tool_calls: bool | None = None,
    strict: bool | None = None,
) -> dict[str, Any]:
    """Arguments of a call with tools, validated."""
    bound: dict[str, Any] = {"tools": as_openai_tools(tools, strict)}
    if tool_choice is not None:
        bound["tool_choice"] = as_openai_choice(tool_choice)
    if parallel_tool_calls is not None:
        bound["parallel_tool_calls"] = parallel_tool_calls
    taken_options(dict(bound))
    return bound


def structured(
    model: Any,
    schema: dict[str, Any] | type | None,
    *,
    method: Method,
    include_raw: bool,
    strict: bool | None,
    kwargs: Mapping[str, Any],
) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
    """A model whose answers are objects of a schema.

    The model stays the first step, so that arguments of a call, such as the draft, reach it.

    Args:
        model: a ``ChatRapid``, or one with bound arguments.
        schema, method, include_raw, strict: see :meth:`ChatRapid.with_structured_output`.
        kwargs: other arguments of a call.

    Raises:
        InvalidParameterError: the method is unknown, or the schema is missing or cannot be
            enforced.
    """
    if method not in _METHODS:
        raise InvalidParameterError(
            f"method={method!r} is unknown: choose one of {', '.join(_METHODS)}"
        )
    if schema is None and method != "json_mode":
        raise InvalidParameterError(
            f"schema=None is not allowed with method={method!r}: pass a schema, or "
            "method='json_mode'"
        )
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    traced = {
        "ls_structured_output_format": {
            "kwargs": {"method": method, "strict": strict},
            "schema": schema,
        }
    }
    parser: Any
    if method == "function_calling":
        assert schema is not None
        name = convert_to_openai_tool(schema)["function"]["name"]
        tools = bound_tools([schema], name, parallel_tool_calls=False, strict=strict)
        bound = model.bind(**{**tools, **traced, **kwargs})
        parser = (
            PydanticToolsParser(tools=[schema], first_tool_only=True)
            if is_class
            else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        )
    else:
        response_format: dict[str, Any] = {"type": "json_object"}
        if method == "json_schema":
            response_format = _response_format(schema, strict)
            taken_options({"response_format": response_format})
        shown = traced if schema is not None else {}
        bound = model.bind(**{"response_format": response_format, **shown, **kwargs})
        parser = PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser()
    parser = _Whole(parser=parser, of_text=method != "function_calling")
    if not include_raw:
        return bound | parser  # type: ignore[no-any-return]
    parsed = RunnablePassthrough.assign(
        parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
    )
    unparsed = RunnablePassthrough.assign(parsed=lambda _: None)
    outcome = parsed.with_fallbacks([unparsed], exception_key="parsing_error")
    return bound | RunnableMap(raw=RunnablePassthrough()) | outcome  # type: ignore[no-any-return]


def _response_format(schema: Any, strict: bool | None) -> dict[str, Any]:
    from rapid_llm.tools.definitions import closed

    function = isinstance(schema, Mapping) and (
        "parameters" in schema or "input_schema" in schema or schema.get("type") == "function"
    )
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        json_schema: Any = schema.model_json_schema()  # with references, which may be recursive
    elif isinstance(schema, Mapping) and not function:
        json_schema = schema
    else:
        try:
            json_schema = convert_to_json_schema(schema)
        except (TypeError, ValueError) as error:
            raise InvalidParameterError(
                f"{schema!r} is no schema ({error}): pass a pydantic class, a TypedDict, or a JSON "
                "schema"
            ) from error
    if strict or not isinstance(schema, Mapping):
        json_schema = closed(json_schema)
    described: dict[str, Any] = {
        "name": str(json_schema.get("title", "answer")),
        "schema": json_schema,
    }
    if strict is not None:
        described["strict"] = strict
    return {"type": "json_schema", "json_schema": described}
