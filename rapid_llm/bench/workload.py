"""What the bench asks: two tasks on one document of a given length."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.context.builder import ContextBuilder
from rapid_llm.context.prompts import build_messages
from rapid_llm.encoding import encode_literal, encode_prompt
from rapid_llm.errors import InvalidParameterError
from rapid_llm.models import sharing_copy

QUOTED = "PROPHECY"
QUESTIONS = {
    "quoting": f"Quote the definition of {QUOTED}.",
    "free": "Summarise the text: what is it about?",
}
CHUNK_TOKENS = 64
RETRIEVED_TOKENS = 512


@dataclass(frozen=True)
class Workload:
    """One question, as the target and as the drafter read it.

    Attributes:
        target: token ids of about ``context`` tokens.
        draft: token ids of the retrieved chunks and the question.
    """

    task: str
    context: int
    target: list[int]
    draft: list[int]


def make_builder(tokenizer: PreTrainedTokenizerBase, embedder: str, longest: int) -> ContextBuilder:
    """Retrieves ``RETRIEVED_TOKENS`` from documents of at most ``longest`` tokens.

    One for all workloads: it loads the embedder, and embeds each document, once.
    """
    return ContextBuilder(
        tokenizer,
        embedder,
        chunk_tokens=CHUNK_TOKENS,
        retrieval_tokens=RETRIEVED_TOKENS,
        compression=max(24.0, longest / RETRIEVED_TOKENS),
        threshold=-1,  # a free question is like no chunk, and yet something is to be drafted from
    )


def make_workload(
    task: str,
    context: int,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    builder: ContextBuilder,
) -> Workload:
    """Cut or repeat a text so that the prompt has ``context`` tokens; retrieve from it.

    Short documents are cut around the entry that is to be quoted, so that it is always there.

    Raises:
        InvalidParameterError: the task is unknown, or ``context`` leaves no room for a document.
    """
    if task not in QUESTIONS:
        raise InvalidParameterError(
            f"task={task!r} is unknown; choose one of {', '.join(QUESTIONS)}"
        )
    question = QUESTIONS[task]
    # The longest question's, so that all tasks of one context share their document.
    frame = max(
        len(encode_prompt(build_messages("x", asked), tokenizer)) for asked in QUESTIONS.values()
    )
    room = context - frame
    if room < 2 * CHUNK_TOKENS:
        raise InvalidParameterError(
            f"context={context} leaves {max(room, 0)} tokens for the document; give at least "
            f"{frame + 2 * CHUNK_TOKENS}"
        )
    ids = encode_literal(text, tokenizer)
    before = len(encode_literal(text[: text.index(QUOTED)], tokenizer))
    start = max(0, min(before - room // 2, len(ids) - room))
    document = tokenizer.decode(list(islice(cycle(ids), start, start + room)))
    retrieved = builder.build([document], question).text
    return Workload(
        task=task,
        context=context,
        target=encode_prompt(build_messages(document, question), tokenizer),
        draft=encode_prompt(build_messages(retrieved, question), tokenizer),
    )


def stretched(model: Any, tokens: int) -> PreTrainedModel:
    """The same model for prompts of ``tokens`` tokens, by a YaRN-scaled rotary embedding.

    For speed only: the model was not trained so. Every weight is shared, not copied.
    """
    original = int(model.config.max_position_embeddings)
    if tokens <= original:
        return model
    longer: Any = sharing_copy(model)
    longer.config.rope_parameters = {
        **longer.config.rope_parameters,
        "rope_type": "yarn",
        "factor": -(-tokens // original) * 1.0,
        "original_max_position_embeddings": original,
    }
    longer.model.rotary_emb = type(longer.model.rotary_emb)(longer.config)
    return longer
