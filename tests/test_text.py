"""Streamed text: whole characters, equal to decoding at once, cut exactly at stop strings."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from conftest import smollm2
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rapid_llm.text import TextStream

LAMP = "\U0001f4a1"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"


@lru_cache
def metaspace(legacy: bool = False) -> PreTrainedTokenizerFast:
    """Words that carry their space, single letters, and bytes for all else, like Llama 2."""
    words = ["▁", "▁the", "▁lamp", "▁▁", "s", "t", "o", "p", "▁sto", "\ufffd", ".", "▁is"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    fallback = decoders.ByteFallback()
    if legacy:
        strip = decoders.Strip(" ", 1, 0)
        steps = [decoders.Replace("▁", " "), fallback, decoders.Fuse(), strip]
    else:
        steps = [fallback, decoders.Metaspace()]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@lru_cache
def words() -> PreTrainedTokenizerFast:
    vocab = {"[UNK]": 0, "the": 1, "lamp": 2, "##s": 3, "##.": 4, "is": 5, "lit": 6}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


KINDS: dict[str, Any] = {
    "smollm2": smollm2,
    "metaspace": metaspace,
    "legacy": lambda: metaspace(legacy=True),
    "words": words,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@lru_cache
def broken_ids() -> list[int]:
    """SmolLM2's tokens that are no whole characters."""
    tokenizer = smollm2()
    return [i for i in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([i])]


def decoded(ids: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def reference(text: str, stop: list[str]) -> tuple[str, bool]:
    """``text`` up to the stop string that ends first (of those, the longest), and if there is."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return (text[: min(ends)[1]], True) if ends else (text, False)


def streamed(ids: list[int], tokenizer: Any, stop: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(i) for i in ids]
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    return pieces, stream.stopped


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Random tokens of every sort: special ones and ids without a token included."""
    anything = st.integers(0, len(KINDS[kind]()) + 5)
    choices = [anything]
    if kind == "smollm2":
        choices += [st.sampled_from(broken_ids()), st.integers(0, 20)]
    return st.lists(st.one_of(choices), max_size=40)


STOPS = st.lists(
    st.text(st.sampled_from("the lamp.s\n\ufffdéa" + LAMP), min_size=1, max_size=5), max_size=4
)


@every_kind
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_are_the_decoded_text_cut_at_the_stop(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]()
    ids = data.draw(ids_of(kind))
    text = decoded(ids, tokenizer)
    stop = data.draw(STOPS)
    if text:  # stop strings that do occur
        for _ in range(data.draw(st.integers(0, 3))):
            start = data.draw(st.integers(0, len(text) - 1))
            stop.append(text[start : start + data.draw(st.integers(1, 6))])
    pieces, stopped = streamed(ids, tokenizer, stop)
    assert ("".join(pieces), stopped) == reference(text, stop)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60), stop=STOPS)
@example(text=FAMILY * 3, stop=[])
@example(text="na\u0308ive " + LAMP * 5, stop=[LAMP * 2])
def test_unicode_text_is_streamed_whole(text: str, stop: list[str]) -> None:
    tokenizer = smollm2()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, stopped = streamed(ids, tokenizer, stop)
    assert ("".join(pieces), stopped) == reference(decoded(ids, tokenizer), stop)
    assert "\ufffd" in decoded(ids, tokenizer) or "\ufffd" not in "".join(pieces)


def test_an_incomplete_character_waits_and_shows_at_the_end() -> None:
    tokenizer = smollm2()
    ids = tokenizer("a" + LAMP, add_special_tokens=False)["input_ids"]
    assert len(ids) > 2
    pieces, _ = streamed(ids, tokenizer, [])
    assert pieces == ["a", *[""] * (len(ids) - 2), LAMP, ""]
    pieces, _ = streamed(ids[:-1], tokenizer, [])
    assert pieces == ["a", *[""] * (len(ids) - 2), "\ufffd"]


def test_text_is_not_held_back_without_reason() -> None:
    tokenizer = smollm2()
    ids = tokenizer("The lamp is lit.", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, ["litter"])
    pieces = [stream.push(i) for i in ids]
    assert pieces == ["The", " lamp", " is", " ", "lit."]
    assert stream.finish() == ""


def test_special_tokens_are_skipped() -> None:
    tokenizer = smollm2()
    ids = [1, *tokenizer("The lamp", add_special_tokens=False)["input_ids"], 2, 0, 2]
    assert streamed(ids, tokenizer, [])[0] == ["", "The", " lamp", "", "", "", ""]


@pytest.mark.parametrize("legacy", [False, True])
def test_the_first_space_of_a_metaspace_tokenizer_is_left_out(legacy: bool) -> None:
    tokenizer = metaspace(legacy)
    ids = tokenizer.convert_tokens_to_ids(["▁the", "▁lamp", "▁", "▁the"])
    assert streamed(ids, tokenizer, [])[0] == ["the", " lamp", " ", " the", ""]


def test_a_run_of_bytes_is_read_as_a_whole() -> None:
    """Bytes that are no text together are none apart: decoding at once says so too."""
    tokenizer = metaspace()
    ids = tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "s", "<0xC3>", "<0xA9>", "<0xA9>"])
    assert streamed(ids, tokenizer, [])[0] == ["", "", "és", "", "", "", "\ufffd" * 3]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("The lamp is lit. Then", [" is"], "The lamp"),
        ("The lamp is lit. Then", ["mp is l"], "The la"),  # across tokens
        ("The lamp is lit. Then", ["am"], "The l"),  # inside one, text behind it
        ("The lamp is lit. Then", ["The"], ""),
        ("The lamp is lit. Then", ["Then"], "The lamp is lit. "),  # at the very end
        ("The lamp is lit. Then", ["Then the"], None),  # only its beginning
        ("The lamp is lit. Then", ["lit. Then", "is"], "The lamp "),
        ("The lamp is lit. Then", ["lamp is", "lamp"], "The "),  # one begins the other
        ("The lamp is lit. Then", ["is lit", "lamp is lit"], "The "),  # one ends the other
        ("The lamp is lit. Then", ["lamp is lit", "is"], "The lamp "),  # one holds the other
        ("The lamp is lit. Then", ["lamp is l", "is lit"], "The "),  # they overlap
        ("aaab", ["aab"], "a"),  # a false start of itself
        (f"go {LAMP}{LAMP} on", [LAMP], "go "),
        (f"go {LAMP}{LAMP} on", [f"{LAMP} o"], f"go {LAMP}"),
        (f"we {FAMILY} go", ["\u200d"], f"we {FAMILY[0]}"),  # inside a cluster
        ("one\n\ntwo", ["\n\n"], "one"),
    ],
)
def test_stop_strings_are_cut_exactly(text: str, stop: list[str], expected: str | None) -> None:
    tokenizer = smollm2()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, stopped = streamed(ids, tokenizer, stop)
    assert "".join(pieces) == (text if expected is None else expected)
    assert stopped == (expected is not None)


# --- special tokens in stop strings --------------------------------------------------------------


def spelled(*parts: Any) -> list[int]:
    """SmolLM2's tokens of some texts, and special tokens given by their ids between them."""
    tokenizer = smollm2()
    encode = lambda part: [part] if isinstance(part, int) else tokenizer.encode(part)  # noqa: E731
    return [i for part in parts for i in encode(part)]


START, END = 1, 2  # <|im_start|> and <|im_end|>


@pytest.mark.parametrize(
    ("ids", "stop", "expected"),
    [
        (spelled("The lamp", END, " is"), ["<|im_end|>"], "The lamp"),  # it is one
        (spelled("The lamp", END, " is"), ["lamp<|im_end|>"], "The "),  # ends one
        (spelled("The lamp", END, " is lit"), ["<|im_end|> is"], "The lamp"),  # begins one
        (spelled("The lamp", END, " is lit"), ["mp<|im_end|> i"], "The la"),  # amid one
        (spelled("The", END, START, " is"), ["<|im_end|><|im_start|>"], "The"),  # two
        (spelled("The", END, " is", START), ["<|im_end|><|im_start|>"], None),
        (spelled("The lamp", END, " is"), ["<|im_end|>!"], None),
        (spelled("The lamp", END, " is"), ["lamp is"], "The "),  # others are not there
        (spelled("The lamp", END, " is"), ["<|im_end|>", "am"], "The l"),  # which comes first
        (spelled("The lamp", START, " is"), ["<|im_end|>", "lamp is"], "The "),
        (spelled("The <|im_", END), ["<|im_<|im_end|>"], "The "),
        (spelled(END), ["<|im_end|>"], ""),
        ([*spelled("a"), *spelled(LAMP)[:-1], END], ["<|im_end|>"], "a\ufffd"),
    ],
)
def test_a_stop_string_may_be_or_hold_a_special_token(
    ids: list[int], stop: list[str], expected: str | None
) -> None:
    pieces, stopped = streamed(ids, smollm2(), stop)
    assert "".join(pieces) == (decoded(ids, smollm2()) if expected is None else expected)
    assert stopped == (expected is not None)
    assert expected is None or pieces[-1] == ""


def test_a_run_of_bytes_ends_where_a_special_token_stops() -> None:
    tokenizer = metaspace()
    ids = tokenizer.convert_tokens_to_ids(["▁the", "<0xC3>", "<0xA9>", "</s>", "s"])
    assert streamed(ids, tokenizer, ["</s>"]) == (["the", "", "", "é", "", ""], True)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_special_tokens_that_complete_no_stop_string_change_nothing(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.sampled_from(spelled("The lamp is lit.", START, END)), max_size=20))
    pieces, stopped = streamed(ids, smollm2(), ["<|im_end|>\x00", "\x00<|im_start|>"])
    assert ("".join(pieces), stopped) == (decoded(ids, smollm2()), False)


def test_nothing_of_a_stop_string_is_ever_returned() -> None:
    tokenizer = smollm2()
    ids = tokenizer("The lamp is lit. Then", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, [" lamp is lit!"])
    shown = [(stream.push(i), stream.text)[1] for i in ids]
    assert shown[:4] == ["The"] * 4  # "lamp is lit" may still be a stop string
    assert shown[-1] == "The lamp is lit. Then"


def test_a_stop_string_that_only_the_end_completes() -> None:
    tokenizer = metaspace()
    stream = TextStream(tokenizer, ["é"])
    for token in ("▁the", "<0xC3>", "<0xA9>"):
        stream.push(tokenizer.convert_tokens_to_ids(token))
    assert not stream.stopped  # another byte could make the run unreadable
    assert stream.finish() == ""
    assert stream.stopped
    assert stream.text == "the"


def test_after_a_stop_string_nothing_comes() -> None:
    tokenizer = smollm2()
    stream = TextStream(tokenizer, [" lamp"])
    ids = tokenizer("The lamp is lit", add_special_tokens=False)["input_ids"]
    assert [stream.push(i) for i in ids] == ["The", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""
    assert stream.text == "The"


def test_finish_gives_the_rest_once() -> None:
    tokenizer = smollm2()
    stream = TextStream(tokenizer, ["lamp!"])
    for i in tokenizer("The lamp", add_special_tokens=False)["input_ids"]:
        stream.push(i)
    assert stream.text == "The "
    assert [stream.finish(), stream.finish()] == ["lamp", ""]
    assert stream.text == "The lamp"
    assert not stream.stopped


@every_kind
def test_a_token_costs_the_same_however_long_the_output(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more than a few tokens are decoded at once, broken characters or not."""
    tokenizer = KINDS[kind]()
    lengths: list[int] = []
    decode = tokenizer.decode

    def counting(ids: list[int], **options: Any) -> str:
        lengths.append(len(ids))
        return decode(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", counting)
    stream = TextStream(tokenizer, ["never"])
    broken = broken_ids()[:3] if kind == "smollm2" else [3]
    for i in [4, 5] * 50 + broken * 50 + [tokenizer.all_special_ids[0]] * 50:
        stream.push(i)
    assert max(lengths, default=0) <= 16
