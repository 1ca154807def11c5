"""The prompt of target and drafter, and documents too long for the context window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.config import RetrievalConfig, Truncate
from rapid_llm.context.cutting import OMISSION, CuttableDocument, share_out
from rapid_llm.context.retrieved import Passage
from rapid_llm.context.validation import require_text
from rapid_llm.encoding import Prompt, encode_prompt
from rapid_llm.errors import ContextWindowError
from rapid_llm.options import require

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
    document = require_text("the document", document)
    question = require_text("the question", question)
    content = f"{document}\n\n{instruction}\n\nQuestion: {question}"
    return [{"role": "user", "content": content}]


class Fitted(NamedTuple):
    """A prompt that fits a window.

    Attributes:
        prompt: what the model reads.
        omitted_tokens: tokens of the documents that it leaves out.
    """

    prompt: Prompt
    omitted_tokens: int


def fit_documents(
    documents: Sequence[str],
    render: Callable[[Sequence[str]], Prompt],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    max_new_tokens: int,
    truncate: Truncate | None = None,
    *,
    passages: Sequence[Sequence[Passage]] = (),
    mark: str = OMISSION,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Fitted:
    """A prompt with documents that fits into a context window.

    Documents that are too long are cut between their beginning, their end and the passages
    retrieved from them, all of which are kept. The room is shared out evenly, but for documents
    that need less or whose passages need more; within one, each of these parts gets as much of its
    surroundings.

    Args:
        documents: the whole documents.
        render: makes the prompt around what it is given of each document, in their order.
        tokenizer: the target's fast tokenizer.
        window: tokens that the target can hold.
        max_new_tokens: tokens kept free for the answer where documents are cut, but no more than
            half of the window, and fewer where the passages need the room, or where the rest of
            the prompt does and nothing need be cut.
        truncate: ``middle`` cuts documents that are too long; None refuses them.
        passages: for each document what was retrieved from it. What cannot be found in its
            document, white space aside, is put at the document's end.
        mark: stands where text was left out.
        chat_template_kwargs: variables of the chat template, where ``render`` gives messages.

    Raises:
        ContextWindowError: the documents do not fit (``truncate=None``), or the passages and the
            rest of the prompt alone do not.
        InvalidParameterError: ``truncate`` is unknown, or the prompt cannot be encoded.
    """
    require(RetrievalConfig, truncate=truncate)
    prompt = whole = render(documents)
    tokens = whole_tokens = len(encode_prompt(whole, tokenizer, chat_template_kwargs))
    room = window - min(max_new_tokens, window // 2) if truncate else window - 1
    if tokens <= room:
        return Fitted(prompt, 0)
    if truncate is None:
        raise ContextWindowError(
            f"the prompt of {tokens} tokens leaves no room for an answer (max_new_tokens="
            f"{max_new_tokens}) in the context window of {window} tokens: shorten the document or "
            "truncate its middle (truncate='middle')"
        )
    cuttable = [
        CuttableDocument(text, found, tokenizer, mark)
        for text, found in zip(documents, passages or [()] * len(documents), strict=True)
    ]
    frame = tokens - sum(document.own_tokens for document in cuttable)
    least = sum(document.least for document in cuttable)
    limit = window - 1 if any(passages) else room  # passages come before room for a long answer
    keep = max(room - frame, least)
    while True:
        parts = share_out(cuttable, keep)
        prompt = render([part.text for part in parts])
        tokens = len(encode_prompt(prompt, tokenizer, chat_template_kwargs))
        if tokens <= (limit if keep == least else room):
            return Fitted(prompt, sum(part.omitted_tokens for part in parts))
        if keep == least:
            break
        # More than the excess of one attempt can be too much: the parts meet in other tokens.
        keep = max(keep - (tokens - room), least)
    if whole_tokens < window:
        return Fitted(whole, 0)
    if any(passages):
        raise ContextWindowError(
            f"the passages retrieved, which truncate does not cut, have {least} tokens and the "
            f"rest of the prompt {frame}: too much for the context window of {window} tokens; "
            "retrieve less or shorten the question"
        )
    what = "it" if len(documents) == 1 else f"{len(documents)} of them"
    raise ContextWindowError(
        f"the prompt has {frame} tokens without the document{'s' * (len(documents) != 1)}, which "
        f"with max_new_tokens={max_new_tokens} leaves no room for {what} in the context window of "
        f"{window} tokens: shorten the question or lower max_new_tokens"
    )
