"""Fit prompts with documents, and chats, into the models' context windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from llama_index.llms.rapid.calls import Call
from llama_index.llms.rapid.fields import Options
from llama_index.llms.rapid.grounding import Retrieved
from llama_index.llms.rapid.statistics import Report
from rapid_llm.context.retrieved import SEPARATOR
from rapid_llm.errors import ContextWindowError

if TYPE_CHECKING:
    from rapid_llm.context.prompts import Fitted
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.encoding import Message, Prompt
    from rapid_llm.engine.model_runner import ModelRunner


def template_variables(decoder: RapidDecoder, options: Options) -> dict[str, Any]:
    """Variables of the chat template: the decoder's, overridden by the call's."""
    return {**decoder.chat_template_kwargs, **options.engine.chat_template_kwargs}


def latest_turns(
    prompt: Prompt, decoder: RapidDecoder, model: ModelRunner, options: Options
) -> Prompt:
    """Drop the oldest turns of a chat that does not fit; other prompts are not changed."""
    if not _is_chat(prompt):
        return prompt
    from rapid_llm.encoding import drop_oldest_turns

    return drop_oldest_turns(
        cast("Sequence[Message]", prompt),
        decoder.tokenizer,
        model.context_window,
        options.sampling.max_new_tokens,
        template_variables(decoder, options),
    )


def grounded_call(
    retrieved: Retrieved,
    render: Callable[[str], Prompt],
    decoder: RapidDecoder,
    options: Options,
    reports: tuple[Report, ...],
) -> Call[Any]:
    """Build the call that answers from documents, with a draft from the retrieved text.

    Where documents and chat do not fit, documents are cut with ``truncate``; after that, or without
    it, the chat loses its oldest turns.

    Args:
        retrieved: contexts of both models.
        render: function from a context to the prompt with it.
        decoder: the models.
        options: options of the call.
        reports: reports of the answers that the call belongs to.

    Raises:
        ContextWindowError: the target's prompt does not fit.
    """
    from rapid_llm.context.prompts import fit_documents

    grounding, truncate = retrieved.grounding, options.retrieval.truncate

    def whole(documents: Sequence[str]) -> Prompt:
        return render(SEPARATOR.join([*documents, *filter(None, [retrieved.beside])]))

    def shorter(documents: Sequence[str]) -> Prompt:
        return latest_turns(whole(documents), decoder, decoder.target, options)

    def fitted(prompt: Callable[[Sequence[str]], Prompt]) -> Fitted:
        return fit_documents(
            grounding.texts,
            prompt,
            decoder.tokenizer,
            decoder.target.context_window,
            options.sampling.max_new_tokens,
            truncate,
            passages=grounding.cited,
            chat_template_kwargs=template_variables(decoder, options),
        )

    try:
        target = fitted(shorter if truncate is None else whole)
    except ContextWindowError:
        if truncate is None:
            raise
        target = fitted(shorter)
    draft = None
    if grounding.empty_reason is None:
        draft = latest_turns(render(grounding.draft), decoder, decoder.drafter, options)
    return Call(
        decoder,
        target.prompt,
        draft,
        options,
        confidence=retrieved.confidence,
        draft_skipped=grounding.empty_reason,
        omitted_tokens=target.omitted_tokens,
        notes={
            "chunk_ids": [p.id for p in grounding.passages if p.id is not None],
            "document_ids": list(retrieved.documents),
            "dropped_messages": dropped(render(""), target.prompt),
        },
        reports=reports,
    )


def dropped(whole: Prompt, kept: Prompt) -> int:
    """Number of messages of a chat that were left out."""
    return len(whole) - len(kept) if _is_chat(whole) and _is_chat(kept) else 0


def _is_chat(prompt: Prompt) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
