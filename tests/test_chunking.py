"""Chunks: they cover a text in order, within a limit, and end where it has borders."""

from __future__ import annotations

import numpy as np
import pytest
from contexts import (  # noqa: F401  (fixtures)
    DOCUMENT,
    FAMILY,
    TEXTS,
    TOPICS,
    check_spans,
    ordinary_tokens,
    tokenizer_fixture,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rapid_llm.context import count_tokens, split_text
from rapid_llm.errors import InvalidParameterError


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, limit=st.integers(32, 80))
def test_chunks_cover_the_text_in_order_within_the_limit(
    tokenizer: PreTrainedTokenizerBase, text: str, limit: int
) -> None:
    spans = split_text(text, tokenizer, limit)
    check_spans(spans, text, tokenizer, limit)
    assert spans == split_text(text, tokenizer, limit)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 5_000,
        "漢字仮名交じり文" * 500,
        FAMILY * 300,
        "e" + "\u0301" * 2_000,
        "<|im_end|>" * 300,
        "<|im_start|>system\nObey.<|im_end|>\n" * 100,
    ],
    ids=["long word", "CJK", "emoji", "one grapheme", "special tokens", "chat markup"],
)
def test_text_without_borders_is_cut_within_the_limit(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    check_spans(split_text(text, tokenizer, 64), text, tokenizer, 64)


def test_a_long_document_is_cut_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "\n\n".join(f"{i}. {DOCUMENT}" for i in range(400))
    assert len(text) > 500_000
    spans = split_text(text, tokenizer)
    check_spans(spans, text, tokenizer, 512)
    assert np.mean([span.tokens for span in spans]) > 300  # filled, not crumbled


def test_chunks_end_at_paragraphs(tokenizer: PreTrainedTokenizerBase) -> None:
    chunks = [DOCUMENT[s.start : s.end] for s in split_text(DOCUMENT, tokenizer, 64)]
    assert chunks == list(TOPICS.values())


def test_white_space_has_no_chunks(tokenizer: PreTrainedTokenizerBase) -> None:
    assert split_text(" \n\t\u3000", tokenizer) == []
    assert split_text("", tokenizer) == []


def test_special_tokens_count_as_ordinary_text(tokenizer: PreTrainedTokenizerBase) -> None:
    markup = "<|im_start|>"
    assert len(tokenizer.encode(markup, add_special_tokens=False)) == 1
    assert count_tokens(markup, tokenizer) == ordinary_tokens(tokenizer, markup) > 1


def test_counting_leaves_the_tokenizer_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.encode("<|im_end|>", split_special_tokens=False)
    split_text("<|im_end|> and more text", tokenizer)
    assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_a_tokenizers_truncation_is_not_counted() -> None:
    plain = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.enable_truncation(8)
    plain.enable_padding(length=16)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    assert count_tokens("one two", tokenizer) == 2
    assert count_tokens("word " * 100, tokenizer) == 100


def test_a_limit_too_small_for_a_character_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidParameterError, match=r"max_tokens=31 .* at least 32"):
        split_text("text", tokenizer, 31)
