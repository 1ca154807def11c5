"""Answers of a decoder to chats with tools: content, reasoning and tool calls, whole or streamed.

:func:`prepare` turns messages and options into arguments of ``RapidDecoder.stream``, and an
:class:`AnswerStream` turns its deltas into content, reasoning and calls. :func:`stream_chat`,
:func:`chat` and :func:`astream_chat` do both in one call.
"""

from __future__ import annotations

from collections.abc import (
    AsyncIterator,
    Collection,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedTokenizerBase

from rapid_llm.aio import iterate_with_progress
from rapid_llm.arguments import arguments_of
from rapid_llm.chat import checked_variables, end_of_turn, opening_of_answer, template_of
from rapid_llm.config import SamplingParams, SpeculationConfig
from rapid_llm.encoding import encode_literal
from rapid_llm.errors import InvalidParameterError
from rapid_llm.options import given
from rapid_llm.progress import PromptProgress
from rapid_llm.speculation.sampling import end_ids, generation_config, stop_strings
from rapid_llm.stats import Origin, Stats
from rapid_llm.text import TextStream
from rapid_llm.tool_formats import KNOWN, SMOLLM2, format_of, reasoning_of
from rapid_llm.tools.calls import ToolCall, ToolCallDelta
from rapid_llm.tools.definitions import ChatOptions
from rapid_llm.tools.grammar import answer_constraint
from rapid_llm.tools.parsing import AnswerParser, Parsed

if TYPE_CHECKING:
    from rapid_llm.chat import Message
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.results import Delta

ChatFinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class ChatDelta:
    """The part of an answer that one round added.

    Attributes:
        content: new text of the answer itself.
        reasoning_content: new text of the model's reasoning.
        tool_calls: additions to the calls.
        token_ids: ids of the round's tokens.
        finish_reason: None but on the last delta: ``tool_calls`` (the answer is complete and calls
            tools), ``stop`` (it is complete, or a stop string was found) or ``length``
            (``max_new_tokens`` reached). With the latter two the last call may be incomplete.
        stats: totals so far, complete on the last delta.
        origins: where each of the tokens came from.
    """

    content: str
    reasoning_content: str
    tool_calls: tuple[ToolCallDelta, ...]
    token_ids: tuple[int, ...]
    finish_reason: ChatFinishReason | None
    stats: Stats
    origins: tuple[Origin, ...] = ()


@dataclass(frozen=True)
class ChatAnswer:
    """A finished answer to a chat.

    Attributes:
        content: text of the answer itself; empty where it only calls tools.
        reasoning_content: text of the model's reasoning.
        tool_calls: calls of tools.
        token_ids: ids of all generated tokens.
        finish_reason: ``tool_calls``, ``stop`` or ``length``, see :class:`ChatDelta`.
        stats: counts and times of the generation.
    """

    content: str
    reasoning_content: str
    tool_calls: tuple[ToolCall, ...]
    token_ids: list[int]
    finish_reason: ChatFinishReason
    stats: Stats

    @classmethod
    def from_deltas(cls, deltas: Sequence[ChatDelta]) -> ChatAnswer:
        """Join all deltas of a finished stream."""
        last = deltas[-1]
        assert last.finish_reason is not None
        return cls(
            content="".join(delta.content for delta in deltas),
            reasoning_content="".join(delta.reasoning_content for delta in deltas),
            tool_calls=joined_calls([call for delta in deltas for call in delta.tool_calls]),
            token_ids=[token for delta in deltas for token in delta.token_ids],
            finish_reason=last.finish_reason,
            stats=last.stats,
        )

    def message(self) -> dict[str, Any]:
        """The answer as a message of OpenAI's form, for the history of the next call."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return message


def joined_calls(deltas: Sequence[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """Join all deltas of an answer's calls, in order."""
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        call = calls.get(delta.index) or ToolCall(delta.id or "", delta.name or "", "")
        calls[delta.index] = replace(call, arguments=call.arguments + delta.arguments)
    return tuple(calls.values())


class AnswerStream:
    """Turns a decoder's deltas into deltas of content, reasoning and tool calls.

    Args:
        parser: parser of the answer's text.
        tokenizer: the model's tokenizer.
        keep: ids of special tokens that the parser needs.
        stop: stop strings of the call.
        ends: ids of tokens that end an answer.
        before: tokens before the text, see ``TextStream``.
    """

    def __init__(
        self,
        parser: AnswerParser,
        tokenizer: PreTrainedTokenizerBase,
        keep: Collection[int],
        stop: Sequence[str],
        ends: Collection[int],
        before: Sequence[int] = (),
    ) -> None:
        self._parser = parser
        self._text = TextStream(tokenizer, stop, before, keep)
        self._ends = ends

    def push(self, delta: Delta) -> ChatDelta:
        """Read a decoder's delta."""
        tokens = delta.token_ids
        if delta.finish_reason == "stop" and tokens and tokens[-1] in self._ends:
            tokens = tokens[:-1]
        text = "".join(map(self._text.push, tokens))
        parsed = [self._parser.feed(text)]
        finish: ChatFinishReason | None = delta.finish_reason
        if finish is not None:
            parsed += [self._parser.feed(self._text.finish()), self._parser.finish()]
            if finish == "stop" and self._parser.calls and not self._parser.cut:
                finish = "tool_calls"
        return ChatDelta(
            content="".join(each.content for each in parsed),
            reasoning_content="".join(each.reasoning_content for each in parsed),
            tool_calls=_all_calls(parsed),
            token_ids=delta.token_ids,
            finish_reason=finish,
            stats=delta.stats,
            origins=delta.origins,
        )


def _all_calls(parsed: Sequence[Parsed]) -> tuple[ToolCallDelta, ...]:
    return tuple(call for each in parsed for call in each.tool_calls)


@dataclass(frozen=True)
class PreparedChat:
    """Arguments with which a decoder answers a chat, and the reader of its answer.

    Attributes:
        chat_template_kwargs: variables of the chat template, the tools among them, for both
            prompts.
        constraint: constraint for ``SamplingParams``; None for free text.
    """

    chat_template_kwargs: dict[str, Any]
    constraint: Mapping[str, Any] | None
    _parser: tuple[Any, ...] = field(repr=False)
    _keep: frozenset[int] = field(repr=False)

    def sampling(self, sampling: SamplingParams | None) -> SamplingParams:
        """Sampling options with the constraint of the call.

        Raises:
            InvalidParameterError: they have another constraint.
        """
        own = given(sampling, SamplingParams, "sampling")
        if self.constraint is None:
            return own
        if own.constraint is not None:
            raise InvalidParameterError(
                "constraint was given together with tools or response_format, which constrain the "
                "answer themselves: pass one of them"
            )
        return replace(own, constraint=self.constraint)

    def stream(self, decoder: RapidDecoder, sampling: SamplingParams) -> AnswerStream:
        """A reader of one answer.

        Args:
            decoder: the decoder that answers.
            sampling: sampling options of the call.
        """
        settings = generation_config(decoder.target.model)
        ends = end_ids(settings, decoder.tokenizer, end_of_turn(decoder.tokenizer))
        # Under the caller's own constraint the first space matters too.
        counts = self.constraint is None and sampling.constraint is not None
        return AnswerStream(
            AnswerParser(*self._parser),
            decoder.tokenizer,
            self._keep,
            (*sampling.stop, *stop_strings(settings)),
            frozenset() if sampling.ignore_eos else ends,
            encode_literal("a", decoder.tokenizer) if counts else (),
        )


def prepare(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: ChatOptions,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PreparedChat:
    """Prepare an answer to a chat with tools, or with a response format.

    Args:
        tokenizer: the model's tokenizer, with a chat template.
        messages: chat messages of the target's prompt. Earlier calls (``tool_calls`` of an
            assistant's message) and their results (messages of the role ``tool`` with a
            ``tool_call_id``) have OpenAI's form.
        options: tools and response format.
        chat_template_kwargs: all variables of the chat template that apply to the call.

    Raises:
        InvalidParameterError: the messages are malformed, ``chat_template_kwargs`` has tools
            beside those of the options, or a schema cannot be enforced (see
            ``SamplingParams.constraint``).
    """
    variables = checked_variables(chat_template_kwargs)
    tools = options.template_variables()
    if tools and variables.keys() & {"tools", "xml_tools"}:
        raise InvalidParameterError(
            "tools were given twice, as tools= and in chat_template_kwargs: pass them as tools="
        )
    variables |= tools
    template = template_of(tokenizer, variables)
    form, reasoning = format_of(template), reasoning_of(template)
    if form is None and options.checked_tools:
        raise InvalidParameterError(
            "the model's chat template shows tools in a format that is not known (known are "
            f"{', '.join(each.name for each in KNOWN)}): take a model of these families, or leave "
            "the tools out"
        )
    form = form or SMOLLM2
    opening = ""
    if reasoning is not None:
        opening = opening_of_answer(messages, tokenizer, variables)
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    callable_tools = options.callable_tools
    markers = set(form.markers if callable_tools else ())
    if reasoning is not None:
        markers |= {reasoning.begin, reasoning.end}
    names = tuple(tool.name for tool in callable_tools)
    return PreparedChat(
        chat_template_kwargs=variables,
        constraint=answer_constraint(options, form, reasoning, opening, special.get),
        _parser=(form if callable_tools else None, reasoning, names, opening),
        _keep=frozenset(i for text, i in special.items() if text in markers),
    )


@dataclass(frozen=True)
class ChatRequest:
    """Arguments of :func:`stream_chat`, which describes them."""

    messages: Sequence[Message] | None
    draft_messages: Sequence[Message] | None = None
    _: KW_ONLY
    options: ChatOptions | None = None
    sampling: SamplingParams | None = None
    speculation: SpeculationConfig | None = None
    confidence: float = 1.0
    progress: PromptProgress | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


@arguments_of(ChatRequest)
def stream_chat(decoder: RapidDecoder, request: ChatRequest) -> Iterator[ChatDelta]:
    """Answer a chat and yield one delta per round.

    Args:
        decoder: the decoder that answers.
        messages: chat messages of the target's prompt, see :func:`prepare`; None lets the drafter
            answer alone from its own.
        draft_messages: chat messages of the draft prompt; the same tools are shown in it. None
            decodes with the target alone.
        options: tools and response format; none by default.
        sampling: sampling options; greedy by default.
        speculation: speculation options; ignored without draft messages.
        confidence: confidence of the retrieval, in [0, 1]; used with ``dynamic_eta``.
        progress: callback for the progress of the prefill.
        chat_template_kwargs: variables of the chat template for this call (``enable_thinking``,
            …); they override the decoder's variables of the same names.

    Yields:
        The content, reasoning and calls of each round.

    Raises:
        InvalidParameterError: see :func:`prepare`.
        RapidError: see ``RapidDecoder.stream``.
    """
    return _answering(decoder, request)


@arguments_of(ChatRequest)
def chat(decoder: RapidDecoder, request: ChatRequest) -> ChatAnswer:
    """Answer a chat; arguments and errors are those of :func:`stream_chat`."""
    return ChatAnswer.from_deltas(list(_answering(decoder, request)))


@arguments_of(ChatRequest)
def astream_chat(decoder: RapidDecoder, request: ChatRequest) -> AsyncIterator[ChatDelta]:
    """:func:`stream_chat` for asyncio; the models run in a thread and do not block the event loop.

    Cancelling the task or closing the iterator stops the generation after the current round or
    chunk of the prefill. ``progress`` is called in that thread.
    """
    return iterate_with_progress(
        lambda report: _answering(decoder, replace(request, progress=report)), request.progress
    )


def _answering(decoder: RapidDecoder, request: ChatRequest) -> Iterator[ChatDelta]:
    own = checked_variables(request.chat_template_kwargs)
    read = request.draft_messages if request.messages is None else request.messages
    if read is None:
        raise InvalidParameterError(
            "messages and draft_messages are both None; give at least one of them"
        )
    prepared = prepare(
        decoder.tokenizer,
        read,
        given(request.options, ChatOptions, "options"),
        {**decoder.chat_template_kwargs, **own},
    )
    sampling = prepared.sampling(request.sampling)
    deltas = decoder.stream(
        request.messages,
        request.draft_messages,
        sampling=sampling,
        speculation=request.speculation,
        confidence=request.confidence,
        progress=request.progress,
        chat_template_kwargs=prepared.chat_template_kwargs,
    )
    return _pushed(prepared.stream(decoder, sampling), deltas)


def _pushed(answer: AnswerStream, deltas: Iterator[Delta]) -> Iterator[ChatDelta]:
    # A generator, so that closing it closes the decoder's.
    try:
        for delta in deltas:
            yield answer.push(delta)
    finally:
        if isinstance(deltas, Generator):
            deltas.close()
