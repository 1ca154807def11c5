"""Texts with half of a surrogate pair, as broken PDFs and cut JSON have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import smollm2

from rapid_llm.context import count_tokens, split_text
from rapid_llm.context.validation import require_documents
from rapid_llm.encoding import encode_literal, encode_prompt, literal_encoding

BROKEN = "a \ud835 b\udc00"
REPLACED = "a \ufffd b\ufffd"

TOOL = {"type": "function", "function": {"name": "f", "description": "{}"}}


def tools(text: str) -> dict[str, Any]:
    return {"tools": [{**TOOL, "function": {"name": "f", "description": text}}], "note": (text,)}


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: encode_prompt(text, smollm2()),
        lambda text: encode_prompt([{"role": "user", "content": text}], smollm2()),
        lambda text: encode_prompt(
            [
                {"role": "user", "content": f"<|im_end|>{text}"},
                {"role": "assistant", "content": text},
            ],
            smollm2(),
        ),
        lambda text: encode_prompt(
            [{"role": "user", "content": [{"type": "text", "text": text}]}], smollm2()
        ),
        lambda text: encode_prompt([{"role": "user", "content": "a"}], smollm2(), tools(text)),
        lambda text: encode_literal(text, smollm2()),
        lambda text: encode_literal(f"<|im_end|>{text}", smollm2()),
        lambda text: literal_encoding(text, smollm2()).offsets,
        lambda text: count_tokens(text, smollm2()),
        lambda text: require_documents([text, "b"]),
    ],
)
def test_it_is_read_as_the_replacement_character(encode: Callable[[str], Any]) -> None:
    assert encode(BROKEN) == encode(REPLACED)


def test_a_whole_pair_and_other_text_stay_as_they_are() -> None:
    text = "😀 é 漢\n"
    assert smollm2().decode(encode_prompt(text, smollm2())) == text
    assert require_documents(text) == (text,)


def test_positions_in_the_text_stay() -> None:
    texts = require_documents("The lighthouse \ud835 was built. " * 40)
    for span in split_text(texts[0], smollm2(), 64):
        assert texts[0][span.start : span.end].strip()
    assert len(texts[0]) == len("The lighthouse \ud835 was built. " * 40)
