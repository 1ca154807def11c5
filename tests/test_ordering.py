"""One order of documents: the same set is the same prompt, in whichever order it comes."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from conftest import tiny_model, tiny_tokenizer

from rapid_llm import RapidDecoder, RapidPipeline, SamplingParams
from rapid_llm.context.ordering import in_order
from rapid_llm.context.retrieved import Passage, ground
from rapid_llm.errors import DocumentError, InvalidParameterError

HUGE = ["9" * 6000, "1" + "0" * 6000]


def test_digits_are_compared_as_numbers_and_the_order_is_total() -> None:
    names = ["1", "2", "10", "A", "a", "page-2", "page-2b", "page-10", "page-10b", "page-", "é"]
    expected = ["1", "2", "10", "A", "a", "page-", "page-2", "page-2b", "page-10", "page-10b", "é"]
    draws = random.Random(0)
    for _ in range(20):
        draws.shuffle(names)
        assert list(in_order(names, "canonical")) == expected
        assert list(in_order(names, "given")) == names
    for same in itertools.permutations(["a/2", "a/02", "a/002"]):
        assert in_order(same, "canonical") == ("a/002", "a/02", "a/2")
    assert in_order(reversed(HUGE), "canonical") == tuple(HUGE)
    assert in_order(["b", "a", "c"], "canonical", {"b": "1", "c": "1"}) == ("b", "c", "a")
    assert in_order([None], "canonical") == (None,)


def test_retrieved_documents_are_read_in_the_order_of_their_ids() -> None:
    texts = {f"page-{n}": f"Text {n}." for n in (10, 2, 1)}
    for found in itertools.permutations(texts):
        grounding = ground([Passage(f"Part of {name}", name) for name in found], texts)
        assert grounding.document_ids == ("page-1", "page-2", "page-10")
        assert grounding.target == "Text 1.\n\nText 2.\n\nText 10."
        # The drafter reads the best passages first, as the retriever ranked them.
        assert grounding.draft == "\n\n".join(f"Part of {name}" for name in found)
        given = ground([Passage("x", name) for name in found], texts, order="given")
        assert given.document_ids == found
    assert ground([], texts, on_empty="read_all").document_ids == ("page-1", "page-2", "page-10")
    kept = ground([], texts, on_empty="read_all", order="given")
    assert kept.document_ids == tuple(texts)
    wrong: Any = "best"
    with pytest.raises(InvalidParameterError, match=r"order='best'.*given"):
        ground([], texts, order=wrong)


@pytest.fixture
def decoder(monkeypatch) -> RapidDecoder:
    monkeypatch.setattr("rapid_llm.engine.device.Device.prefill_chunk", 10)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return RapidDecoder(tiny_model(), tokenizer)


DOCUMENTS = {f"part {n}": " ".join(f"w{3 + (7 * n + i) % 40}" for i in range(30)) for n in (2, 10)}


def asked(decoder: RapidDecoder, documents: Any, **options: Any) -> Any:
    pipeline = RapidPipeline(
        decoder, documents, sampling=SamplingParams(max_new_tokens=2, ignore_eos=True), **options
    )
    return pipeline.ask("w5", "lc")


def test_the_same_documents_in_another_order_are_not_read_again(decoder) -> None:
    turned = dict(reversed(DOCUMENTS.items()))
    first = asked(decoder, turned)
    assert first.stats.cached_tokens == 0
    again = asked(decoder, DOCUMENTS)
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1
    assert again.token_ids == first.token_ids
    assert asked(decoder, turned, order="given").stats.cached_tokens < 10


def test_texts_without_ids_are_read_as_they_are_given(decoder) -> None:
    texts = list(DOCUMENTS.values())
    for listed in (texts, texts[::-1]):
        pipeline = RapidPipeline(decoder, listed)
        assert (pipeline.documents, pipeline.document_ids) == (tuple(listed), None)
    pipeline = RapidPipeline(decoder, {10: texts[0], 9: texts[1]})
    assert (pipeline.documents, pipeline.document_ids) == (tuple(texts[::-1]), ("9", "10"))
    pipeline = RapidPipeline(decoder, {10: texts[0], 9: texts[1]}, order="given")
    assert pipeline.document_ids == ("10", "9")
    for wrong, message in (
        ({}, "no document was given"),
        ({"a": 3}, "the document is int"),
        ({"a": " "}, "the document is empty"),
        ({1: "w3", "1": "w4"}, "two documents have the id '1'"),
    ):
        with pytest.raises(DocumentError, match=message):
            RapidPipeline(decoder, wrong)
