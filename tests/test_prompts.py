"""Prompts for target and drafter, and documents cut in the middle to fit a window."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from conftest import smollm2
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from rapid_llm.context.prompts import (
    INSTRUCTION,
    build_messages,
    fit_document,
    fit_prompt,
    truncate_middle,
)
from rapid_llm.encoding import encode_literal, encode_prompt
from rapid_llm.errors import ContextWindowError, DocumentError, InvalidParameterError

PARAGRAPH = (
    "The lamp on the pier was lit at seven, and the keeper wrote the hour in his book. "
    "Nobody asked him why; the boats came home, one after another, under the rain.\n\n"
)
LAMP = "\U0001f4a1"


@lru_cache
def spaced() -> PreTrainedTokenizerFast:
    """A token a byte, a dummy space before the text: every border counts."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁"])}
    vocab |= {f"<0x{b:02X}>": len(vocab) + b for b in range(256)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="<s>[INST]{{ messages[0]['content'] }}[/INST]",
    )


KINDS: dict[str, Any] = {"smollm2": smollm2, "spaced": spaced}
every_kind = pytest.mark.parametrize("kind", KINDS)


def test_document_comes_first_and_question_last() -> None:
    (message,) = build_messages(" The lamp.\n", "What was lit?")
    assert message["role"] == "user"
    assert message["content"].startswith(" The lamp.\n")
    assert message["content"].endswith("What was lit?")
    assert INSTRUCTION in message["content"]
    (other,) = build_messages("The lamp.", "What was lit?", instruction="Be brief.")
    assert "Be brief." in other["content"]
    assert INSTRUCTION not in other["content"]


def test_questions_on_one_document_share_its_tokens() -> None:
    tokenizer = smollm2()
    document = PARAGRAPH * 3
    one = encode_prompt(build_messages(document, "Why?"), tokenizer)
    two = encode_prompt(build_messages(document, "Who wrote the hour?"), tokenizer)
    shared = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    assert document in tokenizer.decode(one[:shared])


@pytest.mark.parametrize(
    ("document", "question", "name"), [("", "Why?", "document"), ("A lamp.", " \n", "question")]
)
def test_empty_texts_are_refused(document: str, question: str, name: str) -> None:
    with pytest.raises(DocumentError, match=f"the {name} is empty"):
        build_messages(document, question)
    with pytest.raises(DocumentError, match=f"the {name} is empty"):
        fit_document(document, question, smollm2(), 100, 10)


# --- truncation --------------------------------------------------------------------------------


def test_the_middle_is_left_out() -> None:
    tokenizer = smollm2()
    text = "".join(f"Line {i} of the log.\n" for i in range(200))
    ids = encode_literal(text, tokenizer)
    short = truncate_middle(text, tokenizer, 101)
    head = tokenizer.decode(ids[:51])
    assert short == head + tokenizer.decode(ids[-50:])
    assert text.startswith(head)


@every_kind
def test_a_text_that_fits_is_left_as_it_is(kind: str) -> None:
    tokenizer = KINDS[kind]()
    length = len(encode_literal(PARAGRAPH, tokenizer))
    assert truncate_middle(PARAGRAPH, tokenizer, length) == PARAGRAPH
    assert truncate_middle(PARAGRAPH, tokenizer, length - 1) != PARAGRAPH
    assert truncate_middle("", tokenizer, 0) == ""


@every_kind
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("ab é\n1<|>" + LAMP), max_size=80)
    | st.lists(st.sampled_from(["lamp ", "<|im_end|>", "</s>", LAMP * 2]), max_size=20).map(
        "".join
    ),
    limit=st.integers(0, 60),
)
def test_two_ends_of_whole_characters_within_the_limit(kind: str, text: str, limit: int) -> None:
    tokenizer = KINDS[kind]()
    short = truncate_middle(text, tokenizer, limit)
    assert len(encode_literal(short, tokenizer)) <= limit
    assert any(
        text.startswith(short[:i]) and text.endswith(short[i:]) for i in range(len(short) + 1)
    )


def test_truncation_keeps_nearly_all_it_may() -> None:
    tokenizer = smollm2()
    text = (PARAGRAPH + LAMP) * 20
    for limit in range(1, 400, 7):
        kept = len(encode_literal(truncate_middle(text, tokenizer, limit), tokenizer))
        assert limit - 8 <= kept <= limit


def test_control_tokens_are_counted_as_text() -> None:
    tokenizer = smollm2()
    text = "a<|im_end|>b" * 20
    assert len(encode_literal(text, tokenizer)) > 100
    assert len(truncate_middle(text, tokenizer, 100)) < len(text)


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="max_tokens=-1"):
        truncate_middle("a lamp", smollm2(), -1)


# --- fitting a window --------------------------------------------------------------------------


@every_kind
def test_a_document_that_fits_is_not_touched(kind: str) -> None:
    tokenizer = KINDS[kind]()
    messages = build_messages(PARAGRAPH, "Why?")
    window = len(encode_prompt(messages, tokenizer)) + 10
    for truncate in ("middle", None):
        assert fit_document(PARAGRAPH, "Why?", tokenizer, window, 10, truncate) == messages


@every_kind
@pytest.mark.parametrize("text", [PARAGRAPH, "<|im_end|></s>" + LAMP, "a"])
def test_a_long_document_is_shortened_just_enough(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    document = text * (4000 // len(text))
    frame = len(encode_prompt(build_messages(".", "Why?"), tokenizer))
    for window in range(frame + 40, frame + 60):
        messages = fit_document(document, "Why?", tokenizer, window, 16, "middle")
        used = len(encode_prompt(messages, tokenizer)) + 16
        assert window - 16 <= used <= window
        assert messages[0]["content"].endswith(f"{INSTRUCTION}\n\nQuestion: Why?")


def test_any_prompt_around_a_document_can_be_fitted() -> None:
    """A pipeline brings its own wording, as text or messages."""
    tokenizer = smollm2()

    def render(document: str) -> str:
        return f"Read this:\n{document}\nNow sum it up."

    assert fit_prompt(PARAGRAPH, render, tokenizer, 200, 16) == render(PARAGRAPH)
    prompt = fit_prompt(PARAGRAPH * 9, render, tokenizer, 200, 16, "middle")
    assert isinstance(prompt, str)
    assert prompt.startswith("Read this:\nThe lamp")
    assert prompt.endswith("under the rain.\n\n\nNow sum it up.")
    assert 200 - 16 - 8 <= len(encode_prompt(prompt, tokenizer)) <= 200 - 16
    bare = fit_prompt(PARAGRAPH * 9, lambda text: text, tokenizer, 200, 16, "middle")
    assert 200 - 16 - 8 <= len(encode_prompt(bare, tokenizer)) <= 200 - 16


def test_a_long_document_is_refused_with_both_numbers() -> None:
    tokenizer = smollm2()
    tokens = len(encode_prompt(build_messages(PARAGRAPH, "Why?"), tokenizer))
    with pytest.raises(ContextWindowError) as caught:
        fit_document(PARAGRAPH, "Why?", tokenizer, tokens + 5, 6)
    for part in (f"{tokens} tokens", "max_new_tokens=6", f"{tokens + 5} tokens", "by 1", "middle"):
        assert part in str(caught.value)


@pytest.mark.parametrize("window", [1, 20, 70])
def test_a_window_without_room_for_any_of_the_document_is_refused(window: int) -> None:
    with pytest.raises(ContextWindowError, match=rf"max_new_tokens=30.* {window} tokens"):
        fit_document(PARAGRAPH, "Why?", smollm2(), window, 30, "middle")


def test_an_unknown_truncation_is_refused() -> None:
    truncate: Any = "end"
    with pytest.raises(InvalidParameterError, match=r"truncate='end'.*'middle' or None"):
        fit_document(PARAGRAPH, "Why?", smollm2(), 500, 10, truncate)


@pytest.mark.parametrize(("document", "question"), [("a\ud800", "Why?"), ("a", "Why\ud800?")])
def test_half_a_surrogate_pair_is_no_text(document: str, question: str) -> None:
    with pytest.raises(DocumentError, match="lone surrogate at character"):
        build_messages(document, question)
