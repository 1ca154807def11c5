"""Tokenizers whose tokens are pieces of text, and what follows by a grammar, found without ours."""

from __future__ import annotations

from collections.abc import Sequence

import regex
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS = "</s>"


def piece_tokenizer(pieces: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these pieces, and ``</s>`` after them."""
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [(piece[:-1], piece[-1]) for piece in pieces if len(piece) > 1]
    return _fast(Tokenizer(models.BPE(vocab, merges)))


def byte_tokenizer(pieces: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a byte, these pieces (built up from the left), and ``</s>``."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return piece_tokenizer([*letters, *pieces])


def sentencepiece_tokenizer(pieces: Sequence[str]) -> PreTrainedTokenizerFast:
    """As Llama 2's: ``▁`` for a space, a token for each byte, the first space dropped."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", EOS])}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in pieces:
        vocab.setdefault(piece, len(vocab))
    merges = [(piece[:-1], piece[-1]) for piece in pieces if len(piece) > 1]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, bos_token="<s>", unk_token="<unk>"
    )


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def may_follow(pattern: str, pieces: Sequence[str], before: Sequence[int]) -> list[int]:
    """Tokens that may follow others by a regular expression; the last one ends the answer.

    ``pieces`` are the tokens' texts; the token after them is the end.
    """
    text = "".join(pieces[token] for token in before)
    tokens = [
        token
        for token, piece in enumerate(pieces)
        if regex.fullmatch(pattern, text + piece, partial=True)
    ]
    return [*tokens, len(pieces)] if regex.fullmatch(pattern, text) else tokens
