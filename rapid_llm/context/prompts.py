"""Build the prompts of target and drafter, and shorten documents that exceed the context window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.config import RetrievalConfig, Truncate
from rapid_llm.context.chunking import MIN_CHUNK_TOKENS
from rapid_llm.context.retrieved import Passage
from rapid_llm.context.truncation import OMISSION, CuttableDocument, share_out
from rapid_llm.context.validation import require_text
from rapid_llm.encoding import Message, Prompt, encode_prompt
from rapid_llm.errors import ContextWindowError, InvalidParameterError
from rapid_llm.options import require

INSTRUCTION = "Answer the question using only the text above."

EARLIER_QUESTIONS = 2
"""Number of a conversation's earlier questions that are searched for with the last one."""


def build_messages(
    document: str, question: str, *, instruction: str = INSTRUCTION
) -> list[dict[str, str]]:
    """Chat messages that ask a question about a document: one user message.

    The document comes first, so that prompts with other questions share all tokens up to its end.
    The drafter's prompt has the retrieved text instead of the document.

    Args:
        document: whole document, or retrieved text.
        question: question about it.
        instruction: sentence between document and question.

    Raises:
        DocumentError: the document or the question is empty, or not text.
    """
    document = require_text("the document", document)
    question = require_text("the question", question)
    content = f"{document}\n\n{instruction}\n\nQuestion: {question}"
    return [{"role": "user", "content": content}]


def with_document(messages: Sequence[Message], document: str) -> list[Message]:
    """A chat with a document in its first user message, as :func:`build_messages` has it there.

    Later questions then share all tokens up to the end of the conversation so far.

    Args:
        messages: chat messages, of which one is a user's; their content is text.
        document: whole document, or retrieved text.

    Raises:
        DocumentError: the document or the first question is empty, or not text.
        InvalidParameterError: no message is a user's.
    """
    first = next((i for i, m in enumerate(messages) if m.get("role") == "user"), None)
    if first is None:
        raise InvalidParameterError(
            "no message has the role 'user', into which documents are put: add the question"
        )
    (opening,) = build_messages(document, messages[first]["content"])
    return [*messages[:first], {**messages[first], **opening}, *messages[first + 1 :]]


def room_for_retrieved(
    render: Callable[[str], Prompt],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    max_new_tokens: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> int:
    """Number of tokens that a context window leaves for retrieved text, enough for one chunk.

    Args:
        render: function that makes a prompt from the retrieved text.
        tokenizer: the model's tokenizer.
        window: the context window in tokens.
        max_new_tokens: number of tokens kept free for the answer, at most half of the window.
        chat_template_kwargs: variables of the chat template.
    """
    tokens = len(encode_prompt(render("."), tokenizer, chat_template_kwargs))
    return max(MIN_CHUNK_TOKENS, window - min(max_new_tokens, window // 2) - tokens)


def retrieval_query(question: str, earlier: Sequence[str]) -> str:
    """Text to retrieve for in a conversation: a question and the two before it, the latest first.

    A follow-up ("and the second one?") shares few words with the documents. An embedder whose
    maximum input is too short for all leaves out the oldest question.

    Args:
        question: latest question.
        earlier: questions before it, the oldest first.
    """
    return "\n".join([question, *reversed(earlier[-EARLIER_QUESTIONS:])])


class Fitted(NamedTuple):
    """A prompt that fits a context window.

    Attributes:
        prompt: the prompt.
        omitted_tokens: number of the documents' tokens that were left out.
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
    """Build a prompt with documents that fits a context window.

    Documents that are too long are cut, but keep their beginning, their end and the passages
    retrieved from them. All documents get the same share of the room, except those that need less
    or whose passages need more. Within a document all kept parts get equal surroundings.

    Args:
        documents: whole documents.
        render: function that makes the prompt from the (shortened) texts of the documents.
        tokenizer: the target's fast tokenizer.
        window: the target's context window in tokens.
        max_new_tokens: number of tokens kept free for the answer where documents are cut, at most
            half of the window. Fewer are kept free where the passages need the room, or where the
            prompt fits without a cut.
        truncate: ``middle`` cuts documents that are too long; None refuses them.
        passages: passages retrieved from each document. Passages that are not found in their
            document, ignoring white space, are appended to it.
        mark: text that stands where something was left out.
        chat_template_kwargs: variables of the chat template, for a ``render`` that gives messages.

    Raises:
        ContextWindowError: the documents do not fit (``truncate=None``), or even the passages and
            the rest of the prompt do not.
        InvalidParameterError: ``truncate`` is unknown, or the prompt cannot be encoded.
    """
    require(RetrievalConfig, truncate=truncate)
    prompt = whole = render(documents)
    tokens = whole_tokens = len(encode_prompt(whole, tokenizer, chat_template_kwargs))
    room = window - min(max_new_tokens, window // 2) if truncate else window - 1
    if tokens <= room:
        return Fitted(prompt, 0)
    cuttable = [
        CuttableDocument(text, found, tokenizer, mark)
        for text, found in zip(documents, passages or [()] * len(documents), strict=True)
    ]
    frame = tokens - sum(document.own_tokens for document in cuttable)
    the_documents = "the document" if len(documents) == 1 else "the documents"
    if frame >= window:
        raise ContextWindowError(
            f"the prompt has {frame} tokens without {the_documents}, too many for the context "
            f"window of {window} tokens: shorten the question"
        )
    if truncate is None:
        raise ContextWindowError(
            f"the prompt of {tokens} tokens leaves no room for an answer (max_new_tokens="
            f"{max_new_tokens}) in the context window of {window} tokens: shorten {the_documents} "
            "or truncate the middle (truncate='middle')"
        )
    least = sum(document.least for document in cuttable)
    limit = window - 1 if any(passages) else room  # passages matter more than a long answer
    keep = max(room - frame, least)
    while True:
        parts = share_out(cuttable, keep)
        prompt = render([part.text for part in parts])
        tokens = len(encode_prompt(prompt, tokenizer, chat_template_kwargs))
        if tokens <= (limit if keep == least else room):
            return Fitted(prompt, sum(part.omitted_tokens for part in parts))
        if keep == least:
            break
        # Joined parts can have other tokens than those counted, so cut again by the excess.
        keep = max(keep - (tokens - room), least)
    if whole_tokens < window:
        return Fitted(whole, 0)
    if any(passages):
        raise ContextWindowError(
            f"the retrieved passages, which truncate does not cut, have {least} tokens and the "
            f"rest of the prompt {frame}: too much for the context window of {window} tokens; "
            "retrieve less or shorten the question"
        )
    what = "it" if len(documents) == 1 else f"{len(documents)} of them"
    raise ContextWindowError(
        f"the prompt has {frame} tokens without {the_documents}, which with "
        f"max_new_tokens={max_new_tokens} leaves no room for {what} in the context window of "
        f"{window} tokens: shorten the question or lower max_new_tokens"
    )
