"""Constraints: what may be given, and the mask of what may follow."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from decimal import Decimal
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from constrained import (  # noqa: F401  (fixtures)
    EOS,
    PERSON,
    PIECES,
    TOKENIZER,
    WIDTH,
    allowed,
    decoder_fixture,
    jsonschema,
    matcher,
)
from grammar_models import byte_tokenizer, may_follow, piece_tokenizer
from pydantic import BaseModel, Field

from rapid_llm import RapidDecoder, SamplingParams
from rapid_llm.errors import InvalidParameterError
from rapid_llm.grammars import inline_json
from rapid_llm.speculation.constraints import masked

# --- what may be given ---------------------------------------------------------------------------


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    friends: list[Cat] = []


class Owner(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    note: str | None = None


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ("json", "json"),
        (PERSON, "json"),
        (json.dumps(PERSON), "json"),
        (Owner, "json"),
        ({"json": True}, "json"),
        (r"\d{3}", "regex"),
        ({"regex": "json"}, "regex"),
        (["yes", "no"], "choice"),
        (("yes",), "choice"),
        ('start: "a" | B\nB: /[0-9]+/', "grammar"),
        ('root ::= "a" [0-9]+', "grammar"),
    ],
    ids=str,
)
def test_forms_of_a_constraint_are_told_apart(given: Any, form: str) -> None:
    constraint = SamplingParams(constraint=given).constraint
    assert isinstance(constraint, dict)
    assert list(constraint) == [form]
    assert SamplingParams(constraint=constraint).constraint == constraint
    assert pickle.loads(pickle.dumps(constraint)) == json.loads(json.dumps(constraint))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"type": "object", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "items": {"not": {"type": "string"}}}, "not"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"if": {"type": "string"}, "then": {"minLength": 1}}, "if"),
        ({"properties": {"a": {"type": "object", "minProperties": 2}}}, "minProperties"),
        ({"type": "string", "format": "zip code"}, "format"),
        ({"type": "string", "pattern": "(?=a)"}, "pattern"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ({"type": "text"}, "type"),
        ({"properties": {"a": {"typ": "string"}}}, "typ"),
        ({"minimum": 1, "exclusiveMinimum": True}, "exclusiveMinimum"),
        ({"extends": {"type": "string"}, "type": "string"}, "extends"),
        ({"$ref": "#/$defs/nowhere"}, "/$defs/nowhere"),
        ({"$ref": "#"}, "$ref"),
        ({"colour": "red"}, "colour"),
        ({"json": [1]}, "no JSON schema"),
        ({"json": "{bad"}, "no JSON"),
        ({"json": {}, "regex": "a"}, "give one of json, regex, choice, grammar"),
        ("(", "unclosed group"),
        (r"\bword", "lookaround"),
        (r"[^\s\S]", "no text satisfies it"),
        ("start: nowhere", "nowhere"),
        ("start: a\na: a", "a rule to itself"),
        ("root ::= nowhere", "nowhere"),
        ([], "no list of strings"),
        (["a", 1], "no list of strings"),
        (3, "constraint=3"),
        (b"ab", "b'ab'"),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_refused_by_name_before_a_model_is_loaded(
    given: Any, named: str
) -> None:
    with pytest.raises(InvalidParameterError, match="constraint") as refused:
        SamplingParams(constraint=given)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_without_a_constraint_the_package_is_not_imported() -> None:
    code = """
import sys
sys.modules["llguidance"] = None
from rapid_llm import RapidDecoder, SamplingParams
SamplingParams()
try:
    SamplingParams(constraint="a+")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert 'pip install "rapid-llm[structured]"' in done.stdout


def test_a_tokenizer_that_the_grammar_cannot_read_is_refused_before_anything_runs() -> None:
    decoder = RapidDecoder(tiny_model(), tiny_tokenizer())
    with pytest.raises(InvalidParameterError, match="constraint"):
        decoder.stream([3, 4, 5], sampling=SamplingParams(constraint="a+"))
    assert decoder.generate([3, 4, 5], sampling=SamplingParams(max_new_tokens=2)).token_ids


# --- the mask ------------------------------------------------------------------------------------


LETTERS = ["a", "b", "c", "ab", "d", "e"]


@pytest.mark.parametrize("pattern", ["[ab]{1,3}(de?|c[ab])?|cc", "(a|ab)*c", "[^a]b?", "e?"])
def test_the_mask_is_what_the_expression_allows_wherever_a_draft_went_before(pattern: str) -> None:
    """Random walks: drafts, other drafts from the same place, and accepted tokens."""
    tokenizer, random = piece_tokenizer(LETTERS), np.random.default_rng(0)
    for _ in range(20):
        ours, said = matcher(pattern, tokenizer, 70), []
        while len(said) < 6 and not ours.over():
            for _ in range(3):
                drafted: list[int] = []
                while len(drafted) < 4:
                    legal = may_follow(pattern, LETTERS, [*said, *drafted])
                    assert allowed(ours, drafted, 70) == legal
                    if ours.over(drafted):
                        assert legal == [len(LETTERS)]
                        break
                    token = int(random.choice(legal))
                    if token == len(LETTERS):
                        break
                    drafted.append(token)
            kept = drafted[: random.integers(len(drafted) + 1)]
            ours.commit(kept)
            said += kept


def test_masks_of_a_draft_are_those_of_its_positions() -> None:
    ours = matcher(PERSON)
    text = TOKENIZER('{"name":"co","age').input_ids
    for first in range(0, len(text), 3):
        rows = ours.mask(text, len(text) + 1 - first)
        for i, row in enumerate(rows):
            assert np.array_equal(row, matcher(PERSON).mask(text[: first + i], 1)[0])


def test_guesses_end_before_what_may_not_follow() -> None:
    ours = matcher(r"[a-z]+ [a-z]+")
    guess = TOKENIZER("cook and name").input_ids
    assert ours.legal([], guess) == TOKENIZER("cook and").input_ids
    assert ours.legal(guess[:1], TOKENIZER("1").input_ids) == []


def test_forced_text_is_known_without_a_model() -> None:
    ours = matcher(PERSON)
    start = TOKENIZER('{"').input_ids
    assert ours.forced(start, 9) == TOKENIZER("name").input_ids
    assert ours.forced([], 9) == []
    assert ours.forced(start, 0) == []


def test_an_answer_may_end_only_where_the_grammar_may() -> None:
    ours = matcher("[0-9]{1,3}")
    digits = TOKENIZER("123").input_ids
    assert EOS not in allowed(ours, [])
    assert EOS in allowed(ours, digits[:1])
    assert allowed(ours, digits) == [EOS]
    assert [ours.over(digits[:n]) for n in range(4)] == [False, False, False, True]
    later = matcher("[0-9]{1,3}", least_new_tokens=2)
    assert EOS not in allowed(later, digits[:1])
    assert EOS in allowed(later, digits[:2])


def test_ids_beyond_the_tokenizer_and_other_special_tokens_never_follow() -> None:
    tokenizer = byte_tokenizer(PIECES)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>"]})
    tokenizer.add_tokens(["<plain>"])
    call, plain = tokenizer.convert_tokens_to_ids(["<call>", "<plain>"])
    anything = allowed(matcher("(.|\n)*", tokenizer), [])
    assert call not in anything
    assert plain not in anything  # a name in angle brackets is read as a control token's
    assert max(anything) < len(tokenizer)
    assert allowed(matcher("start: <plain>", tokenizer), []) == [plain]
    named = matcher('start: "a" <call> "b"', tokenizer)
    assert allowed(named, tokenizer("a").input_ids) == [call]
    # a model that lacks the last tokens
    narrow = allowed(matcher("(.|\n)*", tokenizer, width=200), [], 200)
    assert max(narrow) < 200


def test_a_processor_that_forbids_all_that_may_follow_gives_way() -> None:
    mask = matcher(["ab"]).mask([], 1)
    a = TOKENIZER("a").input_ids[0]
    logits = torch.zeros(1, WIDTH)
    logits[0, a] = float("-inf")
    for form in (mask, torch.from_numpy(mask)):
        kept = masked(logits, form)
        assert kept[0].isfinite().nonzero()[:, 0].tolist() == [a]


def test_a_lazy_trigger_leaves_text_free_until_a_call_begins() -> None:
    grammar = f"""%llguidance {{}}
start: call* TEXT
call: trigger arguments "</call>"
trigger[lazy]: TEXT "<call>"
arguments: {inline_json(PERSON)}
TEXT: /(.|\\n)*/
"""
    ours = matcher({"grammar": grammar})
    assert len(allowed(ours, [])) > 150  # all that begin a character
    begun = TOKENIZER("Well <call>").input_ids
    assert allowed(ours, begun) == TOKENIZER("{").input_ids + TOKENIZER('{"').input_ids
    assert not ours.over(begun)
    whole = TOKENIZER('Well <call>{"name":"","age":1,"roles":[]}</call>').input_ids
    assert ours.legal([], whole) == whole


def may_be(constraint: Any, text: str) -> bool:
    """Whether a text is a whole answer."""
    ours, ids = matcher(constraint), TOKENIZER(text, add_special_tokens=False).input_ids
    return ours.legal([], ids) == ids and (ours.over(ids) or EOS in allowed(ours, ids))


class Bill(BaseModel):
    total: Decimal
    items: list[int] = Field(json_schema_extra={"uniqueItems": False})


TITLED = {"oneOf": [{"const": 1, "title": "low"}, {"const": 2.5}, {"enum": ["x", True, None]}]}
TEXTS: list[tuple[Any, list[str]]] = [
    (Bill.model_json_schema(), [f'{{"total": {t}, "items": [1, 1]}}' for t in
                                ("1.5", '"1.5"', '"-.5"', '"."', '""', '"1.5.1"', "null")]),
    (TITLED, ["1", "2.5", '"x"', "true", "null", "2", "false"]),
    ({"oneOf": [{"const": True}, {"const": 1}]}, ["true", "1", "0"]),
    ({"const": "a\x01b\x7f"}, [r'"a\u0001b\u007f"', '"ab"']),
    ({"enum": ["a\nb", "\\"]}, [r'"a\nb"', r'"\\"', '"ab"']),
    ({"type": "array", "unevaluatedItems": True, "items": {"type": "null"}}, ["[null]", "[1]"]),
    ({"type": "object", "propertyNames": True}, ["{}", '{"a": 1}', "1"]),
    ({"$ref": "#/$defs/a", "maxLength": 2, "$defs": {"a": {"type": "string"}}}, ['"ab"', '"abc"']),
    ({"type": "integer", "maximum": 2**53 + 1}, [str(2**53), str(2**53 + 2)]),
    ({"type": "string", "enum": ["a", 1]}, ['"a"', "1"]),
    ({"allOf": [{"enum": [1, 2, 3]}, {"minimum": 2}]}, ["1", "3"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "texts"), TEXTS, ids=lambda value: str(value)[:40])
def test_a_text_may_be_the_answer_where_it_is_valid(schema: Any, texts: list[str]) -> None:
    validator = jsonschema.Draft202012Validator(schema)
    valid = [validator.is_valid(json.loads(text)) for text in texts]
    assert [may_be({"json": schema}, text) for text in texts] == valid
    assert True in valid
    assert False in valid


def test_a_property_has_no_other_spelling_with_other_values() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for form in (schema, {**schema, "patternProperties": {"^b": {"type": "integer"}}}):
        assert may_be(form, '{"a": 1, "c": "x"}')
        for name in ("a", r"\u0061", "b", r"\u0062") if form is not schema else ("a", r"\u0061"):
            assert not may_be(form, f'{{"{name}": "x"}}'), name
            assert not may_be(form, f'{{"c": 1, "{name}": "x"}}'), name
