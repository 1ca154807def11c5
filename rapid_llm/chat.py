"""Render chat messages with the model's chat template and encode them.

Templates that refuse system messages or repeated roles get an equivalent chat that they accept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from secrets import token_hex
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rapid_llm.errors import InvalidParameterError, RapidError
from rapid_llm.literal import Controls, controls_of, copy_of
from rapid_llm.surrogates import nested_without_surrogates
from rapid_llm.tool_messages import adapted, checked_calls, one_call_each

Message: TypeAlias = Mapping[str, Any]

SYSTEM_ROLES = ("system", "developer")

_REASONING = ("reasoning", "thinking", "redacted_thinking")
_JOINED = ("system", "user", "assistant")
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)
_REFUSALS = (TemplateError, TypeError, ValueError)

# Marks the end of an answer that is to be continued. A space after it shows whether the template
# strips the content of messages.
_END = token_hex(16)


def encode_chat(
    messages: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Encode a chat, with the opening of the assistant's answer.

    A last message of the assistant is continued. Tools, earlier calls and their results are shown
    to every model, see :func:`rapid_llm.tool_messages.adapted`.

    Args:
        messages: chat messages, dicts with a role and a content.
        tokenizer: tokenizer with a chat template.
        variables: extra variables for the chat template; ``tools`` are tools in OpenAI's form.

    Returns:
        Token ids of the prompt.

    Raises:
        InvalidParameterError: a message or a variable is malformed, or the template refuses them.
    """
    template = template_of(tokenizer, checked_variables(variables))
    chat = [nested_without_surrogates(checked_message(message)) for message in messages]
    variables = nested_without_surrogates(checked_variables(variables))
    controls = controls_of(tokenizer)
    quoted = [controls.quote_message(message) for message in chat]
    settings: dict[str, Any] = controls.quote(variables)
    ids: list[int] | None = None
    if (quoted, settings) == (chat, variables):
        text = _render(*adapted(chat, variables, template), tokenizer, controls)
        encoding = tokenizer(text, add_special_tokens=False, verbose=False)
        if not tokenizer.is_fast or controls.written_out(encoding.encodings[0], text):
            ids = encoding["input_ids"]
    if ids is None:
        quoted, settings = adapted(quoted, settings, template)
        settings["chat_template"] = controls.comparing(template)
        text = _render(quoted, settings, tokenizer, controls)
        ids = copy_of(tokenizer).encode_rendered(text)
    if not ids:
        raise InvalidParameterError("the messages have no tokens: pass at least one with content")
    return ids


def template_of(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> str:
    """The chat template for some variables: a tokenizer may have one of its own for tools.

    Raises:
        InvalidParameterError: the tokenizer has none.
    """
    if not tokenizer.chat_template:
        raise InvalidParameterError(
            "the tokenizer has no chat template, so messages cannot be encoded: pass the prompt "
            "as text, or set tokenizer.chat_template"
        )
    return tokenizer.get_chat_template(tools=variables.get("tools"))


def checked_variables(variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """Validate variables for a chat template and return them as a dict.

    Raises:
        InvalidParameterError: the value is not a mapping with string keys, or one of the names is
            reserved.
    """
    if variables is None:
        return {}
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise InvalidParameterError(
            f"chat_template_kwargs={variables!r} is not allowed: pass a dict of variables of the "
            "chat template, as {'enable_thinking': False}"
        )
    if taken := sorted(_RESERVED & variables.keys()):
        raise InvalidParameterError(
            f"chat_template_kwargs holds {taken[0]!r}, which is not for the caller to choose: "
            "leave it out"
        )
    return dict(variables)


def opening_of_answer(
    messages: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Text with which a chat template opens the answer, such as that of its reasoning.

    Where the last message is the assistant's, its content is the opening.

    Args:
        messages: chat messages that :func:`encode_chat` takes.
        tokenizer: tokenizer with a chat template.
        variables: extra variables for the chat template.
    """
    chat = [nested_without_surrogates(checked_message(message)) for message in messages]
    if chat[-1]["role"] == "assistant" and not chat[-1].get("tool_calls"):
        content: str = chat[-1]["content"]
        return content
    settings = checked_variables(variables)
    template = template_of(tokenizer, settings)
    chat, settings = adapted(chat, settings, template)
    for history in _variants(chat):
        opened = _attempt(history, settings, tokenizer)
        if isinstance(opened, str):
            closed: str = tokenizer.apply_chat_template(history, tokenize=False, **settings)
            return opened.removeprefix(closed) if opened.startswith(closed) else ""
    return ""


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the control token that ends an answer in the chat template; None if there is none."""
    if not tokenizer.chat_template:
        return None
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _END}]
    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False)
    except _REFUSALS:
        return None
    controls = controls_of(tokenizer)
    end = controls.pattern.match(text.rpartition(_END)[2].lstrip())
    return None if end is None else tokenizer.convert_tokens_to_ids(end[0])


# --- messages ----------------------------------------------------------------------------------


def checked_message(message: Any) -> dict[str, Any]:
    """A chat message with its content as text, and the arguments of its calls as objects.

    Raises:
        InvalidParameterError: it has no role, or a part that is not text.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidParameterError(
            f"message {message!r} is not allowed: each message is a dict with a role (text) and "
            "a content"
        )
    message = checked_calls(message)
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""  # as OpenAI's form has it
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple):
        raise InvalidParameterError(
            f"message content of type {type(content).__name__} is not allowed: content is text or "
            "a list of text parts"
        )
    answers = [part for part in parts if not _is_reasoning(part)]
    checked = {**message, "content": "\n".join(map(_part_text, answers))}
    thoughts = [thought for part in parts if _is_reasoning(part) if (thought := _thought(part))]
    if thoughts and message["role"] == "assistant":
        checked.setdefault("reasoning_content", "\n".join(thoughts))
    return checked


def _is_reasoning(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _REASONING


def _thought(part: Mapping[str, Any]) -> str:
    texts = (part.get(key) for key in ("reasoning", "thinking", "text", "content"))
    return next((text for text in texts if isinstance(text, str)), "")


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InvalidParameterError(
            f"a message part of type {kind!r} is not allowed: this is a text model, send parts of "
            'the form {"type": "text", "text": ...}'
        )
    text: str = part["text"]
    return text


# --- the template ------------------------------------------------------------------------------


def _render(
    chat: list[dict[str, Any]],
    variables: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    controls: Controls,
) -> str:
    """Render the chat, or else its first variant that the template accepts."""
    refusals = []
    for history in _variants(chat):
        text = _attempt(history, variables, tokenizer)
        if isinstance(text, str):
            return text
        refusals.append(text)
    roles = ", ".join(message["role"] for message in chat)
    raise InvalidParameterError(
        controls.unquote(
            f"the model's chat template refuses messages with the roles {roles} ({refusals[0]}): "
            "send the roles and the order that it expects"
        )
    ) from refusals[0]


def _attempt(
    chat: list[dict[str, Any]], variables: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> str | Exception:
    """The rendered chat, or the error with which the template refuses it."""
    try:
        return _apply(chat, variables, tokenizer)
    except RapidError:
        raise
    except _REFUSALS as error:
        return error


def _apply(
    chat: list[dict[str, Any]], variables: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> str:
    last = chat[-1]
    if last["role"] != "assistant" or last.get("tool_calls"):
        opened: str = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False, **variables
        )
        return opened
    content: str = last["content"]
    begun = [*chat[:-1], {**last, "content": f"{content}{_END} "}]
    text: str = tokenizer.apply_chat_template(begun, tokenize=False, **variables)
    text, end, rest = text.rpartition(_END)
    if not end:
        raise InvalidParameterError(
            "the model's chat template leaves out the end of the last message, which is the "
            "assistant's, so that it cannot be continued: end the chat with another role"
        )
    trims = not rest.startswith(" ")
    return text.removesuffix(content[len(content.rstrip()) :]) if trims else text


def _variants(chat: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The chat, then variants with alternating roles, with and without a system message.

    A chat with several calls in a message also has a variant with one in each.
    """
    yield chat
    if any(len(message.get("tool_calls") or ()) > 1 for message in chat):
        chat = one_call_each(chat)
        yield chat
    yield _alternating(chat, keep_system=True)
    yield _alternating(chat, keep_system=False)


def _alternating(chat: Sequence[dict[str, Any]], *, keep_system: bool) -> list[dict[str, Any]]:
    """A chat with alternating user and assistant messages after at most one system message.

    Later system messages become user messages; neighbouring messages of one role are joined.
    """
    first = next((i for i, m in enumerate(chat) if m["role"] not in SYSTEM_ROLES), len(chat))
    system = [{**m, "role": "system"} for m in chat[:first]] if keep_system else []
    rest = [{**m, "role": "user"} if m["role"] in SYSTEM_ROLES else m for m in chat[len(system) :]]
    if rest and rest[0]["role"] == "assistant":
        rest.insert(0, {"role": "user", "content": ""})
    joined: list[dict[str, Any]] = []
    for message in [*system, *rest]:
        before = joined[-1] if joined else {}
        if message["role"] == before.get("role") in _JOINED and not before.get("tool_calls"):
            contents = (m["content"] for m in (before, message))
            joined[-1] = before | message | {"content": "\n\n".join(filter(None, contents))}
        else:
            joined.append(message)
    return joined
