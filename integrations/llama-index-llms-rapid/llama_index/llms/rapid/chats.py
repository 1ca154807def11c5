"""Build the call that answers a chat: its prompts, tools and response format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.tools.types import BaseTool

from llama_index.llms.rapid.answers import ChatReader
from llama_index.llms.rapid.calls import Call
from llama_index.llms.rapid.fields import Options
from llama_index.llms.rapid.messages import PromptWriter
from llama_index.llms.rapid.statistics import reports
from llama_index.llms.rapid.templates import FilledMessages
from llama_index.llms.rapid.windows import dropped, latest_turns, template_variables
from rapid_llm.errors import InvalidParameterError

if TYPE_CHECKING:
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.encoding import Message, Prompt
    from rapid_llm.tools.definitions import ChatOptions

ARGUMENTS = ("tools", "tool_choice", "parallel_tool_calls", "response_format")
"""Arguments of a chat for tools and the response format."""


def taken_options(arguments: dict[str, Any]) -> ChatOptions:
    """Remove tools and response format from the arguments of a chat, and return them.

    Raises:
        InvalidParameterError: they are malformed, or exclude each other.
        MissingDependencyError: any are given, and llguidance is not installed.
    """
    from rapid_llm.tools.definitions import ChatOptions

    given = {name: arguments.pop(name) for name in ARGUMENTS if name in arguments}
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(given.get("tools"), list | tuple):
        given["tools"] = [as_openai_tool(tool) for tool in given["tools"]]
    if given.get("tool_choice") == "any":  # as other providers call it
        given["tool_choice"] = "required"
    return ChatOptions(**given)


def as_openai_tool(tool: BaseTool | Mapping[str, Any]) -> dict[str, Any]:
    """Convert a tool to OpenAI's form.

    Raises:
        InvalidParameterError: it is not a tool.
    """
    if isinstance(tool, Mapping):
        return dict(tool)
    if not isinstance(tool, BaseTool):
        raise InvalidParameterError(
            f"{tool!r} is no tool: pass LlamaIndex's tools (FunctionTool.from_defaults(function), "
            "QueryEngineTool, …), or dicts in OpenAI's form"
        )
    described = tool.metadata.to_openai_tool(skip_length_check=True)
    # LlamaIndex looks the tool up by this name, and not by that of OpenAI's form.
    described["function"]["name"] = tool.metadata.name
    return described


def chat_call(
    messages: Sequence[ChatMessage],
    draft_messages: Sequence[ChatMessage] | None,
    asked: ChatOptions,
    options: Options,
    decoder: RapidDecoder,
    writer: PromptWriter,
    grounded: Callable[[Callable[[str], Prompt], str, Options], Call[Any]],
) -> Call[ChatResponse]:
    """Build the call that answers a chat.

    Args:
        messages: messages of the target's prompt.
        draft_messages: messages of the drafter's prompt; None without a draft.
        asked: tools and response format.
        options: options of the call.
        decoder: the models.
        writer: writer of the model's prompts.
        grounded: function that builds the call for messages with retrieved text. Its arguments are
            a function from a text to the prompt with it, the retrieved text, and the options.

    Raises:
        InvalidParameterError: tools or a response format that cannot be enforced on this model.
    """
    begun, context = messages, None
    if isinstance(messages, FilledMessages) and messages.context is not None:
        fill, context = messages.fill, messages.context
        begun = fill("")
    options, reader = _formed(writer.from_messages(begun), asked, options, decoder, writer)
    if context is not None:
        call = grounded(lambda text: writer.from_messages(fill(text)), context, options)
        return replace(call, reader=reader)
    whole, draft = writer.from_messages(messages), None
    target = latest_turns(whole, decoder, decoder.target, options)
    if draft_messages is not None:
        draft = writer.from_messages(draft_messages)
        draft = latest_turns(draft, decoder, decoder.drafter, options)
    return Call(
        decoder,
        target,
        draft,
        options,
        notes={"dropped_messages": dropped(whole, target)},
        # Outside a synthesizer, a template without retrieved text does not answer: it condenses,
        # reranks or extracts.
        reports=reports(filled=isinstance(messages, FilledMessages)),
        reader=reader,
    )


def _formed(
    prompt: Prompt,
    asked: ChatOptions,
    options: Options,
    decoder: RapidDecoder,
    writer: PromptWriter,
) -> tuple[Options, Callable[[], ChatReader]]:
    """Options with the constraint of tools and response format, and a factory of readers."""
    if not writer.uses_template:
        return _held(options, asked), ChatReader
    from rapid_llm.chat import template_of
    from rapid_llm.tool_formats import reasoning_of
    from rapid_llm.tools.answers import prepare

    chat = cast("Sequence[Message]", prompt)
    prepared = prepare(decoder.tokenizer, chat, asked, template_variables(decoder, options))
    variables = prepared.chat_template_kwargs
    engine = replace(options.engine, chat_template_kwargs=variables)
    options = replace(options, sampling=prepared.sampling(options.sampling), engine=engine)
    thinks = reasoning_of(template_of(decoder.tokenizer, variables)) is not None
    if not (thinks or asked.callable_tools):
        return options, ChatReader
    return options, lambda: ChatReader(prepared.stream(decoder, options.sampling))


def _held(options: Options, asked: ChatOptions) -> Options:
    """Options with the constraint of the response format, for a chat without a chat template."""
    if asked.checked_tools:
        raise InvalidParameterError(
            "tools cannot be shown to this model, as its prompts do not go through a chat template "
            "(it has none, or messages_to_prompt was given): leave tools out"
        )
    if asked.schema is None:
        return options
    if options.sampling.constraint is not None:
        raise InvalidParameterError(
            "constraint was given together with response_format, which constrains the answer "
            "itself: pass one of them"
        )
    constraint = {"json": asked.schema}
    return replace(options, sampling=replace(options.sampling, constraint=constraint))
