"""Prompts for target and drafter, and documents cut in the middle to fit a window."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
from conftest import smollm2
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from rapid_llm.config import Truncate
from rapid_llm.context.prompts import INSTRUCTION, build_messages, fit_documents
from rapid_llm.context.retrieved import Passage
from rapid_llm.context.truncation import OMISSION, CuttableDocument, share_out
from rapid_llm.encoding import Prompt, encode_literal, encode_prompt
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


@pytest.mark.parametrize("truncate", [None, "middle"])
def test_a_long_question_is_blamed_and_not_its_short_document(truncate: Truncate | None) -> None:
    def render(texts: Sequence[str]) -> Prompt:
        return build_messages(texts[0], "Why? " * 300)

    passages = [[Passage(PARAGRAPH)]]
    with pytest.raises(ContextWindowError) as caught:
        fit_documents([PARAGRAPH], render, smollm2(), 200, 6, truncate, passages=passages)
    assert "window of 200 tokens: shorten the question" in str(caught.value)
    assert "truncate" not in str(caught.value)


@pytest.mark.parametrize("window", [1, 20, 44])
def test_a_window_without_room_for_any_of_the_document_is_refused(window: int) -> None:
    with pytest.raises(ContextWindowError, match=rf" {window} tokens: shorten the question"):
        fit_documents([PARAGRAPH], asked, smollm2(), window, 30, "middle")


def test_an_unknown_truncation_is_refused() -> None:
    truncate: Any = "end"
    with pytest.raises(InvalidParameterError, match=r"truncate='end'.*middle or None"):
        fit_documents([PARAGRAPH], asked, smollm2(), 500, 10, truncate)


# --- around what was retrieved -----------------------------------------------------------------

LOG = "".join(f"Line {i} of the log says nothing new.\n" for i in range(2000))
LEDGER = "".join(f"Row {i} of the ledger.\n" for i in range(400))


def fit(
    documents: Sequence[str],
    passages: Sequence[Sequence[Passage]],
    window: int = 500,
    max_new_tokens: int = 16,
) -> tuple[str, int]:
    fitted = fit_documents(
        documents, asked, smollm2(), window, max_new_tokens, "middle", passages=passages
    )
    assert len(encode_prompt(fitted.prompt, smollm2())) < window
    (message,) = fitted.prompt
    assert isinstance(message, dict)
    return message["content"], fitted.omitted_tokens


def test_every_document_is_cut_around_its_own_passages() -> None:
    log, row = Passage("Line 1203 of the log says"), Passage("Row 217 of the ledger.")
    content, omitted = fit([LOG, LEDGER], [[log], [row]])
    whole = len(encode_literal(LOG, smollm2())) + len(encode_literal(LEDGER, smollm2()))
    assert whole - 484 < omitted < whole
    first, second = content.index("Line 1203 of the log says"), content.index("Row 217 of the led")
    assert content.startswith("Line 0 of")
    assert "\nLine 1202 of the log says nothing new.\nLine 1203 of" in content
    assert content.index("of the log says nothing new.\n\n\nRow 0 of the ledger") > first
    assert second < content.index("Row 399 of the ledger.\n")
    assert content.count(OMISSION) == 4  # before and after each passage
    assert re.findall(r"Row (\d+) of the ledger.\nRow", content)[0] == "0"


def test_the_room_is_shared_but_for_documents_that_need_less() -> None:
    short = "A note of a few words."
    content, _ = fit([LOG, short, LEDGER], [[], [], []])
    assert short in content
    log, ledger = content.split(short)
    counts = [len(encode_literal(part, smollm2())) for part in (log, ledger)]
    assert abs(counts[0] - counts[1]) < 40  # the ledger's part has the question beside it


@pytest.mark.parametrize(
    "text",
    [
        "Line 700 of the log says nothing new.\nLine 701 of the log",
        "  Line 700 of the   log says\n\nnothing new. Line 701 of the log\n",
        "Line700ofthelogsaysnothingnew.Line701ofthelog",
    ],
    ids=["as it stands", "other white space", "none"],
)
def test_a_passage_is_found_whatever_its_white_space(text: str) -> None:
    content, _ = fit([LOG], [[Passage(text)]])
    assert "\nLine 700 of the log says nothing new.\nLine 701 of the log" in content
    assert content.count("Line 700 of") == 1


def test_a_passage_that_is_not_in_its_document_is_put_at_its_end() -> None:
    content, _ = fit([LOG, LEDGER], [[Passage("A summary by another model.")], []])
    log, ledger = content.split("A summary by another model.")
    assert log.endswith("Line 1999 of the log says nothing new.\n\n\n")
    assert ledger.startswith("\n\nRow 0 of the ledger.")


def test_what_a_pipeline_adds_to_a_passage_is_not_looked_for() -> None:
    passage = Passage("file: log.txt\n\nLine 700 of the log", excerpt="Line 700 of the log")
    content, _ = fit([LOG], [[passage]])
    assert "\nLine 700 of the log says" in content
    assert "log.txt" not in content


def test_a_repeated_passage_is_kept_where_it_was_retrieved() -> None:
    document = "Again.\n".join(f"Section {i}. " + "Much was said there. " * 60 for i in range(9))
    start = document.index("Again.", document.index("Section 6."))
    content, _ = fit([document], [[Passage("Again.", start=start)]], 200)
    assert "Again.\nSection 7." in content
    elsewhere, _ = fit([document], [[Passage("Again.", start=10**6)]], 200)
    assert "Again.\nSection 1." in elsewhere


def test_overlapping_passages_are_kept_once() -> None:
    passages = [
        Passage("Line 700 of the log says nothing new."),
        Passage("the log says nothing new.\nLine 701 of the log"),
        Passage("log says"),
    ]
    content, _ = fit([LOG], [passages])
    assert content.count("Line 700 of the log says nothing new.\nLine 701 of the log") == 1


def test_no_text_is_left_out_that_is_as_short_as_the_mark_for_it() -> None:
    tokenizer = smollm2()
    text = LEDGER[: LEDGER.index("Row 60 ")]
    document = CuttableDocument(text, [Passage("Row 9 of the ledger.")], tokenizer)
    mark = len(encode_literal(OMISSION, tokenizer))
    shortest = document.tokens
    for tokens in range(document.least, document.tokens):
        first, *others, last = document.cut(tokens).text.split(OMISSION)
        end = len(first)
        for piece in [*others, last]:
            start = len(text) - len(last) if piece is last else text.index(piece, end)
            shortest = min(shortest, len(encode_literal(text[end:start], tokenizer)))
            end = start + len(piece)
    assert shortest == mark + 1


def test_passages_come_before_room_for_a_long_answer() -> None:
    passage = Passage(LOG[400:2400])
    tokens = len(encode_literal(passage.text, smollm2()))
    window = tokens + 90
    content, omitted = fit([LOG], [[passage]], window, max_new_tokens=window)
    assert passage.text in content
    assert omitted > 0
    with pytest.raises(ContextWindowError) as caught:
        fit([LOG], [[passage]], tokens, 1)
    for part in (f"context window of {tokens} tokens", "passages", "retrieve less"):
        assert part in str(caught.value)


@pytest.mark.parametrize("max_new_tokens", [250, 499, 500, 10**6])
def test_an_answer_as_long_as_the_window_leaves_half_of_it_to_the_prompt(
    max_new_tokens: int,
) -> None:
    content, _ = fit([LOG], [[]], 500, max_new_tokens)
    assert 240 < len(encode_prompt(build_messages(content, "Why?"), smollm2())) - 20 < 300
    whole = build_messages(PARAGRAPH, "Why?")
    room = len(encode_prompt(whole, smollm2())) + 60
    fitted = fit_documents([PARAGRAPH], asked, smollm2(), room, max_new_tokens)
    assert fitted == (whole, 0)


@every_kind
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_passage_is_lost(kind: str, data: st.DataObject) -> None:
    """Whatever the documents, the window and the passages, in them or not."""
    tokenizer = KINDS[kind]()
    words = st.lists(
        st.sampled_from(["lamp ", "a", " ", "\n", "é", LAMP, "<|im_end|>", "</s>", "pier. "]),
        min_size=1,
        max_size=120,
    )
    documents = data.draw(st.lists(words.map("".join).filter(str.strip), min_size=1, max_size=3))
    passages = []
    for document in documents:
        spans = st.tuples(st.integers(0, len(document)), st.integers(1, 12))
        cuts = data.draw(st.lists(spans, max_size=3))
        texts = [document[start : start + length] for start, length in cuts]
        texts += data.draw(st.lists(st.just("not in there"), max_size=1))
        passages.append([Passage(text) for text in texts if text.strip()])
    window = data.draw(st.integers(60, 400))

    try:
        prompt, omitted = fit_documents(
            documents, asked, tokenizer, window, 8, "middle", passages=passages
        )
    except ContextWindowError:
        return
    (message,) = prompt
    assert isinstance(message, dict)
    assert len(encode_prompt(prompt, tokenizer)) < window
    assert omitted >= 0
    cut = prompt != asked(documents)
    assert (omitted > 0) <= cut
    if cut:
        for passage in (passage for some in passages for passage in some):
            assert passage.text.strip() in message["content"]


@pytest.mark.parametrize(("document", "question"), [("a\ud800", "Why?"), ("a", "Why\ud800?")])
def test_half_a_surrogate_pair_is_replaced(document: str, question: str) -> None:
    expected = build_messages(
        document.replace("\ud800", "\ufffd"), question.replace("\ud800", "\ufffd")
    )
    assert build_messages(document, question) == expected
