"""Compare the vocabularies of target and drafter, and check that a model has a prompt's tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rapid_llm.engine.model_runner import ModelRunner
from rapid_llm.errors import TokenizerMismatchError


def unshared_tokens(
    target: ModelRunner,
    drafter: ModelRunner,
    tokenizer: PreTrainedTokenizerBase,
    drafter_tokenizer: PreTrainedTokenizerBase | None,
) -> frozenset[int]:
    """Ids of added tokens that only one of two models has.

    Args:
        target, drafter: the two models.
        tokenizer: the target's tokenizer.
        drafter_tokenizer: the drafter's tokenizer; without it only the sizes of the vocabularies
            are compared.

    Raises:
        TokenizerMismatchError: the vocabularies differ in more than added tokens.
    """
    if drafter_tokenizer is None:
        if drafter.vocab_size != target.vocab_size:
            raise TokenizerMismatchError(
                f"the drafter {drafter.name} has a vocabulary of {drafter.vocab_size}, the "
                f"target {target.name} of {target.vocab_size}; take a drafter of the same "
                "family, or pass drafter_tokenizer= if only the padding differs"
            )
        return frozenset()
    ours, theirs = tokenizer.get_vocab(), drafter_tokenizer.get_vocab()
    if ours == theirs:
        return frozenset()
    either = dict(ours.items() ^ theirs.items())  # tokens that do not have one id in both
    added = tokenizer.get_added_vocab() | drafter_tokenizer.get_added_vocab()
    ids = Counter((ours | theirs).values())
    for token, i in either.items():
        if (token in ours and token in theirs) or token not in added or ids[i] > 1:
            raise TokenizerMismatchError(
                f"the tokenizers of {target.name} ({len(ours)} tokens) and {drafter.name} "
                f"({len(theirs)} tokens) differ, for example in {token!r}, and not only in "
                "tokens that were added; take a drafter that shares the target's tokenizer"
            )
    return frozenset(either.values())


def unreadable(
    prompt: Sequence[int],
    runner: ModelRunner,
    tokenizer: PreTrainedTokenizerBase,
    unshared: Collection[int],
) -> str | None:
    """Message naming the first token of a prompt that a model lacks; None if it has all.

    Args:
        prompt: token ids.
        runner: the model.
        tokenizer: tokenizer of the prompt.
        unshared: ids of tokens that the model lacks, see :func:`unshared_tokens`.
    """
    embedded = runner.model.get_input_embeddings().weight.shape[0]
    unknown = (i for i in prompt if i >= embedded or i in unshared)
    if (found := next(unknown, None)) is None:
        return None
    token = tokenizer.convert_ids_to_tokens(found)
    return f"holds {token!r}, which {runner.name} does not have"
