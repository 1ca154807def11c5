"""The prompt of target and drafter, and documents too long for the context window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.context.validation import require_text
from rapid_llm.encoding import Prompt, encode_literal, encode_prompt, literal_encoding
from rapid_llm.errors import ContextWindowError, InvalidParameterError

INSTRUCTION = "Answer the question using only the text above."


def build_messages(
    document: str, question: str, *, instruction: str = INSTRUCTION
) -> list[dict[str, str]]:
    """One user message: the document, then the instruction and the question.

    The document comes first, so that another question on it shares all tokens up to its end. The
    drafter's prompt is the same, with the retrieved text in the place of the document.

    Raises:
        DocumentError: the document or the question is empty, or not text.
    """
    require_text("the document", document)
    require_text("the question", question)
    return _messages(document, question, instruction)


def truncate_middle(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """The beginning and the end of a text, as the long-context benchmarks shorten documents.

    Args:
        text: any text; control tokens in it count as ordinary text.
        tokenizer: the target's fast tokenizer.
        max_tokens: tokens to keep, half of them at each end; at least 0.

    Returns:
        The text itself if it fits; else its two ends joined, whole characters only, at most
        ``max_tokens`` when encoded again.

    Raises:
        InvalidParameterError: ``max_tokens`` is negative.
    """
    if max_tokens < 0:
        raise InvalidParameterError(
            f"max_tokens={max_tokens} is not allowed: max_tokens must be at least 0"
        )
    offsets = literal_encoding(text, tokenizer).offsets
    if len(offsets) <= max_tokens:
        return text
    keep = max_tokens
    while keep > 0:
        # Where a character has several tokens, cutting before and after it drops it whole.
        head = text[: offsets[(keep + 1) // 2][0]]
        tail = text[offsets[len(offsets) - keep // 2 - 1][1] :]
        excess = len(encode_literal(head + tail, tokenizer)) - max_tokens
        if excess <= 0:
            return head + tail
        keep -= excess  # the two ends meet in other tokens than they had
    return ""


def fit_prompt(
    document: str,
    render: Callable[[str], Prompt],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    max_new_tokens: int,
    truncate: Literal["middle"] | None = None,
) -> Prompt:
    """A prompt with a document that fits into a context window.

    Args:
        document: the whole document.
        render: makes the prompt around what it is given of the document.
        tokenizer: the target's fast tokenizer.
        window: tokens that the target can hold.
        max_new_tokens: tokens kept free for the answer.
        truncate: ``middle`` leaves out the middle of a document that is too long; None refuses it.

    Raises:
        ContextWindowError: the document does not fit (``truncate=None``), or nothing of it would.
        InvalidParameterError: ``truncate`` is unknown, or the prompt cannot be encoded.
    """
    if truncate not in ("middle", None):
        raise InvalidParameterError(
            f"truncate={truncate!r} is not allowed: truncate must be 'middle' or None"
        )
    prompt = render(document)
    room = window - max_new_tokens
    tokens = len(encode_prompt(prompt, tokenizer))
    if tokens <= room:
        return prompt
    if truncate is None:
        raise ContextWindowError(
            f"the prompt of {tokens} tokens and max_new_tokens={max_new_tokens} exceed the context "
            f"window of {window} tokens by {tokens - room}: shorten the document or truncate its "
            "middle (truncate='middle')"
        )
    frame = tokens - len(encode_literal(document, tokenizer))
    keep = room - frame
    while keep > 0:
        prompt = render(truncate_middle(document, tokenizer, keep))
        excess = len(encode_prompt(prompt, tokenizer)) - room
        if excess <= 0:
            return prompt
        keep -= excess  # a document can meet its surroundings in a token more than nothing does
    raise ContextWindowError(
        f"the prompt has {frame} tokens without the document, which with max_new_tokens="
        f"{max_new_tokens} leaves no room for it in the context window of {window} tokens: "
        "shorten the question or lower max_new_tokens"
    )


def fit_document(
    document: str,
    question: str,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    max_new_tokens: int,
    truncate: Literal["middle"] | None = None,
) -> Prompt:
    """:func:`fit_prompt` around :func:`build_messages`, which see for the errors."""
    require_text("the document", document)
    require_text("the question", question)
    return fit_prompt(
        document,
        lambda part: _messages(part, question, INSTRUCTION),
        tokenizer,
        window,
        max_new_tokens,
        truncate,
    )


def _messages(document: str, question: str, instruction: str) -> list[dict[str, str]]:
    content = f"{document}\n\n{instruction}\n\nQuestion: {question}"
    return [{"role": "user", "content": content}]
