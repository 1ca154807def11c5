"""Prompts for target and drafter, and documents cut in the middle to fit a window."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
from conftest import smollm2
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from rapid_llm.context.cutting import OMISSION, CuttableDocument, share_out
from rapid_llm.context.prompts import INSTRUCTION, build_messages, fit_documents
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


# --- fitting a window --------------------------------------------------------------------------


def asked(texts: Sequence[str]) -> list[dict[str, str]]:
    return build_messages("\n\n".join(texts), "Why?")


def bare(text: str, tokenizer: Any, limit: int, mark: str = "") -> str:
    """The text in a window that leaves ``limit`` tokens for it and nothing else."""
    fitted = fit_documents(
        [text], lambda texts: texts[0], tokenizer, limit + 1, 1, "middle", mark=mark
    )
    assert isinstance(fitted.prompt, str)
    return fitted.prompt


def test_the_middle_is_left_out() -> None:
    tokenizer = smollm2()
    text = "".join(f"Line {i} of the log.\n" for i in range(200))
    ids = encode_literal(text, tokenizer)
    head, tail = tokenizer.decode(ids[:51]), tokenizer.decode(ids[-50:])
    assert bare(text, tokenizer, 101) == head + tail
    marked = bare(text, tokenizer, 101 + len(encode_literal(OMISSION, tokenizer)), OMISSION)
    assert marked == head + OMISSION + tail


@every_kind
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("ab é\n1<|>" + LAMP), min_size=1, max_size=80)
    | st.lists(
        st.sampled_from(["lamp ", "<|im_end|>", "</s>", LAMP * 2]), min_size=1, max_size=20
    ).map("".join),
    limit=st.integers(1, 60),
)
def test_two_ends_of_whole_characters_within_the_limit(kind: str, text: str, limit: int) -> None:
    tokenizer = KINDS[kind]()
    part = share_out([CuttableDocument(text, (), tokenizer, mark="")], limit)[0]
    short = part.text
    assert any(
        text.startswith(short[:i]) and text.endswith(short[i:]) for i in range(len(short) + 1)
    )
    kept = len(encode_literal(text, tokenizer)) - part.omitted_tokens
    assert kept <= limit
    assert (kept < limit) <= (part.omitted_tokens == 0)


@every_kind
def test_a_document_that_fits_is_not_touched(kind: str) -> None:
    tokenizer = KINDS[kind]()
    messages = build_messages(PARAGRAPH, "Why?")
    window = len(encode_prompt(messages, tokenizer)) + 10
    for truncate in ("middle", None):
        fitted = fit_documents([PARAGRAPH], asked, tokenizer, window, 10, truncate)
        assert fitted == (messages, 0)


@every_kind
@pytest.mark.parametrize("text", [PARAGRAPH, "<|im_end|></s>" + LAMP, "a"])
def test_a_long_document_is_shortened_just_enough(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    document = text * (4000 // len(text))
    frame = len(encode_prompt(build_messages(".", "Why?"), tokenizer))
    for window in range(frame + 40, frame + 60):
        messages, omitted = fit_documents([document], asked, tokenizer, window, 16, "middle")
        used = len(encode_prompt(messages, tokenizer)) + 16
        assert window - 16 <= used <= window
        assert messages[0]["content"].endswith(f"{INSTRUCTION}\n\nQuestion: Why?")
        assert omitted > 0


def test_any_prompt_around_documents_can_be_fitted() -> None:
    """A pipeline brings its own wording, as text or messages."""
    tokenizer = smollm2()

    def render(texts: Sequence[str]) -> str:
        return f"Read this:\n{texts[0]}\nNow sum it up."

    assert fit_documents([PARAGRAPH], render, tokenizer, 200, 16).prompt == render([PARAGRAPH])
    prompt, _ = fit_documents([PARAGRAPH * 9], render, tokenizer, 200, 16, "middle")
    assert isinstance(prompt, str)
    assert prompt.startswith("Read this:\nThe lamp")
    assert prompt.endswith("under the rain.\n\n\nNow sum it up.")
    assert 200 - 16 - 8 <= len(encode_prompt(prompt, tokenizer)) <= 200 - 16


def test_a_long_document_is_refused_with_both_numbers() -> None:
    tokenizer = smollm2()
    tokens = len(encode_prompt(build_messages(PARAGRAPH, "Why?"), tokenizer))
    assert fit_documents([PARAGRAPH], asked, tokenizer, tokens + 1, 6).omitted_tokens == 0
    with pytest.raises(ContextWindowError) as caught:
        fit_documents([PARAGRAPH], asked, tokenizer, tokens, 6)
    for part in (f"prompt of {tokens} tokens", "max_new_tokens=6", f"of {tokens} tokens", "middle"):
        assert part in str(caught.value)


@pytest.mark.parametrize("window", [1, 20, 44])
def test_a_window_without_room_for_any_of_the_document_is_refused(window: int) -> None:
    with pytest.raises(ContextWindowError, match=rf"max_new_tokens=30.* {window} tokens"):
        fit_documents([PARAGRAPH], asked, smollm2(), window, 30, "middle")


def test_an_unknown_truncation_is_refused() -> None:
    truncate: Any = "end"
    with pytest.raises(InvalidParameterError, match=r"truncate='end'.*'middle' or None"):
        fit_documents([PARAGRAPH], asked, smollm2(), 500, 10, truncate)


@pytest.mark.parametrize(("document", "question"), [("a\ud800", "Why?"), ("a", "Why\ud800?")])
def test_half_a_surrogate_pair_is_no_text(document: str, question: str) -> None:
    with pytest.raises(DocumentError, match="lone surrogate at character"):
        build_messages(document, question)
