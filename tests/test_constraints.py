"""Constraints: what may be given, what they allow, and answers under them."""

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
from conftest import installed, tiny_model, tiny_tokenizer
from grammar_models import (
    byte_tokenizer,
    may_follow,
    piece_tokenizer,
    sentencepiece_tokenizer,
)
from pydantic import BaseModel, Field
from transformers import LogitsProcessor, LogitsProcessorList

from rapid_llm import RapidDecoder, SamplingParams, SpeculationConfig
from rapid_llm.errors import GenerationTimeoutError, InvalidParameterError, NumericalError
from rapid_llm.grammars import canonical, inline_json
from rapid_llm.speculation.constraints import Constraints, Matcher, masked

llguidance = installed("llguidance")
jsonschema = installed("jsonschema")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "roles": {"type": "array", "items": {"enum": ["cook", "poet"]}, "maxItems": 2},
    },
    "required": ["name", "age", "roles"],
    "additionalProperties": False,
}
PIECES = ['{"', '":', '",', "na", "me", "nam", "name", "co", "coo", "cook", "ĠĠ"]
TOKENIZER = byte_tokenizer(PIECES)
WIDTH = 300  # the last tokens have no text
EOS = TOKENIZER.eos_token_id


def model_for_text(seed: int = 0, **changes: Any) -> Any:
    own = {"vocab_size": WIDTH, "bos_token_id": None, "pad_token_id": None, "eos_token_id": EOS}
    return tiny_model(seed=seed, **(own | changes))


@pytest.fixture(scope="module")
def decoder() -> RapidDecoder:
    return RapidDecoder(model_for_text(), TOKENIZER, model_for_text(seed=1))


def prompt(text: str = 'He said {"name":"cook"} and {"name":"co') -> list[int]:
    return TOKENIZER(text).input_ids


def matcher(constraint: Any, tokenizer: Any = TOKENIZER, width: int = WIDTH, **changes) -> Matcher:
    how = {"ends": {tokenizer.eos_token_id}, "least_new_tokens": 0} | changes
    return Constraints(tokenizer).matcher(canonical(constraint), width, **how)


def allowed(of: Matcher, drafted: list[int], width: int = WIDTH) -> list[int]:
    logits = masked(torch.zeros(1, width), of.mask(drafted, 1))
    return logits[0].isfinite().nonzero()[:, 0].tolist()


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


# --- answers -------------------------------------------------------------------------------------

SPECULATIONS = {
    "exact": {"mode": "exact", "gamma": 3},
    "exact, auto": {"mode": "exact", "gamma": "auto"},
    "exact, no lookup": {"mode": "exact", "gamma": 4, "lookup": False},
    "augmented": {"mode": "augmented", "gamma": 3},
    "paper": {"mode": "paper", "gamma": 4},
    "paper, unsure": {"mode": "paper", "gamma": 4, "min_confidence": 0.2},
    "rest": {"drafting": "rest", "gamma": 5},
    "streaming": {"mode": "exact", "drafting": "streaming", "gamma": 3},
    "triforce": {"mode": "paper", "drafting": "triforce", "gamma": 3},
}
TEXTS = {
    "schema": PERSON,
    "choice": ["cook", "cooking", "name", "yes"],
    "regex": r"[0-9]{2,4}-(name|no)+",
    "gbnf": 'root ::= "<" ("cook" | "na")* ">"',
}


def valid(name: str, text: str) -> bool:
    import regex

    if name == "schema":
        jsonschema.validate(json.loads(text), PERSON)
        return True
    if name == "choice":
        return text in TEXTS["choice"]
    pattern = TEXTS["regex"] if name == "regex" else "<(cook|na)*>"
    return regex.fullmatch(pattern, text) is not None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("way", SPECULATIONS)
def test_every_finished_answer_is_allowed_whatever_drafts(decoder, way, temperature) -> None:
    finished, seeds = 0, range(2 if temperature else 1)
    for name, constraint in TEXTS.items():
        for seed in seeds:
            sampling = SamplingParams(
                temperature=temperature, seed=seed, max_new_tokens=60, constraint=constraint
            )
            speculation = SpeculationConfig(**SPECULATIONS[way])
            deltas = list(
                decoder.stream(prompt(), prompt()[5:], sampling=sampling, speculation=speculation)
            )
            if deltas[-1].finish_reason == "stop":
                finished += 1
                assert valid(name, "".join(delta.text for delta in deltas))
    assert finished >= 2 * len(seeds)


class FreshMask(LogitsProcessor):
    """The grammar library alone: a matcher that reads the whole answer at every step."""

    def __init__(self, constraint: Any, prompt_tokens: int) -> None:
        from rapid_llm.grammars import llguidance_grammar

        backend = TOKENIZER.backend_tokenizer.to_str()
        self.tokenizer = llguidance.LLTokenizer(backend, n_vocab=WIDTH, eos_token=EOS)
        self.grammar = llguidance_grammar(json.dumps(canonical(constraint)))
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import llguidance.numpy as bitmasks

        fresh = llguidance.LLMatcher(self.tokenizer, self.grammar)
        for token in input_ids[0, self.prompt_tokens :].tolist():
            assert fresh.consume_token(token)
        bits = bitmasks.allocate_token_bitmask(1, WIDTH)
        bitmasks.fill_next_token_bitmask(fresh, bits, 0)
        flags = np.unpackbits(bits.view(np.uint8), bitorder="little")[:WIDTH]
        return scores.masked_fill(~torch.from_numpy(flags.astype(bool)), float("-inf"))


def generated(model: Any, ids: list[int], constraint: Any, new: int) -> list[int]:
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),
        do_sample=False,
        max_new_tokens=new,
        logits_processor=LogitsProcessorList([FreshMask(constraint, len(ids))]),
        pad_token_id=EOS,
    )
    return output[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in TEXTS),
        ("schema", {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3}),
        ("regex", {"repetition_penalty": 0.6, "min_new_tokens": 9}),
        ("gbnf", {"suppress_tokens": [TOKENIZER.convert_tokens_to_ids("cook")]}),
    ],
    ids=str,
)
def test_exact_greedy_is_what_generate_gives_with_the_same_mask(name, settings) -> None:
    model = model_for_text(seed=5)
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    decoders = RapidDecoder(model, TOKENIZER), RapidDecoder(model, TOKENIZER, model_for_text(6))
    for ids in (prompt(), prompt("name name name cook")):
        want = generated(model, ids, TEXTS[name], 40)
        sampling = SamplingParams(max_new_tokens=40, constraint=TEXTS[name])
        plain = decoders[0].generate(ids, sampling=sampling)
        results = [plain] + [
            each.generate(
                ids, ids[3:], sampling=sampling, speculation=SpeculationConfig(**SPECULATIONS[way])
            )
            for each in decoders
            for way in ("exact", "exact, auto", "exact, no lookup", "rest")
        ]
        for result in results:
            # Where nothing else may follow the answer ends without a token that says so.
            said = result.token_ids
            assert said + [EOS] * (len(want) - len(said)) == want
            assert len(want) - len(said) <= (result.finish_reason == "stop")


def test_an_answer_that_is_cut_says_so_and_one_that_just_fits_is_finished(decoder) -> None:
    def answer(constraint: Any, tokens: int) -> Any:
        sampling = SamplingParams(max_new_tokens=tokens, constraint=constraint)
        return decoder.generate(prompt(), prompt(), sampling=sampling)

    assert answer(PERSON, 5).finish_reason == "length"
    assert answer(["yes"], 3).finish_reason == "stop"
    assert answer(["yes"], 3).text == "yes"
    assert answer(["yes"], 2).finish_reason == "length"


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_answer_that_can_only_be_empty_is(decoder, ignore_eos) -> None:
    sampling = SamplingParams(constraint={"regex": ""}, ignore_eos=ignore_eos)
    result = decoder.generate(prompt(), prompt(), sampling=sampling)
    assert (result.text, result.token_ids, result.finish_reason) == ("", [], "stop")


def test_ignoring_the_end_the_grammar_alone_ends_an_answer(decoder) -> None:
    sampling = SamplingParams(constraint="[0-9]{0,7}", ignore_eos=True, max_new_tokens=30)
    result = decoder.generate(prompt(), prompt(), sampling=sampling)
    assert len(result.text) == 7
    assert result.finish_reason == "stop"


def test_a_stop_string_ends_an_answer_before_its_grammar_does(decoder) -> None:
    sampling = SamplingParams(constraint="[0-9]{3}name[0-9]{3}", stop=["am"], max_new_tokens=30)
    result = decoder.generate(prompt(), prompt(), sampling=sampling)
    assert result.text.endswith("n")
    assert len(result.text) == 4
    assert result.finish_reason == "stop"


def test_white_space_between_json_tokens_is_limited(decoder) -> None:
    """A model that likes nothing better than white space."""
    model = model_for_text(seed=2)
    spaces = TOKENIZER(" \n\t  ").input_ids
    with torch.no_grad():
        model.lm_head.weight[spaces] = 50 * model.lm_head.weight.abs().amax()
    liking = RapidDecoder(model, TOKENIZER)
    sampling = SamplingParams(
        temperature=1.0,
        max_new_tokens=100,
        constraint={"type": "array", "items": {"type": "boolean"}},
    )
    for seed in range(5):
        text = liking.generate(
            prompt(), prompt(), sampling=SamplingParams(**{**vars(sampling), "seed": seed})
        ).text
        assert "   " * 3 not in text


def test_text_that_the_grammar_forces_costs_no_pass(decoder) -> None:
    """“name” is one token, "age" and "roles" are letters."""
    for way in ("exact", "paper", "augmented"):
        speculation = SpeculationConfig(mode=way, gamma=4, lookup=False)
        sampling = SamplingParams(max_new_tokens=70, constraint=PERSON)
        stats = decoder.generate(
            prompt(), prompt(), sampling=sampling, speculation=speculation
        ).stats
        look_ahead = stats.rounds if way == "augmented" else 0
        assert stats.draft_passes - look_ahead < stats.drafted_tokens
    plain = decoder.generate(prompt(), sampling=sampling).stats
    assert plain.rounds < plain.completion_tokens
    assert plain.drafted_tokens == 0
    assert plain.method == "lc"


SPACED = [*'▁abcdehlonrtu{}":,0123456789é', "▁a", "ab", "▁b", '{"']


@pytest.mark.parametrize(
    "pattern", [" ab?", "[éü]{3}", "(ab )+b", '\\{"a": "(日本|a)"\\}', "  a|b  b"]
)
def test_text_of_bytes_and_spaces_is_what_the_grammar_allows(pattern: str) -> None:
    import regex

    tokenizer = sentencepiece_tokenizer(SPACED)
    own = {"vocab_size": 300, "eos_token_id": tokenizer.eos_token_id}
    decoder = RapidDecoder(tiny_model(**own), tokenizer, tiny_model(seed=1, **own))
    ids, finished = tokenizer("ab ab hello").input_ids, 0
    for seed in range(6):
        sampling = SamplingParams(
            temperature=1.0, seed=seed, max_new_tokens=30, constraint={"regex": pattern}
        )
        deltas = list(decoder.stream(ids, ids, sampling=sampling))
        text = "".join(delta.text for delta in deltas)
        if deltas[-1].finish_reason == "stop":
            finished += 1
            assert regex.fullmatch(pattern, text), text
    assert finished > 0


def test_a_decoder_serves_on_after_a_timeout_and_a_closed_stream(decoder) -> None:
    sampling = SamplingParams(max_new_tokens=50, constraint=PERSON)
    want = decoder.generate(prompt(), prompt(), sampling=sampling).token_ids
    stream = decoder.stream(prompt(), prompt(), sampling=sampling)
    next(stream)
    stream.close()
    late = SamplingParams(max_new_tokens=50, constraint=PERSON, timeout=1e-9)
    with pytest.raises(GenerationTimeoutError):
        decoder.generate(prompt(), prompt(), sampling=late)
    assert decoder.generate(prompt(), prompt(), sampling=sampling).token_ids == want


@pytest.mark.parametrize("broken", ["target", "drafter"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_is_reported_as_such_under_a_constraint(broken: str, temperature: float) -> None:
    models = {"target": model_for_text(), "drafter": model_for_text(seed=1)}
    with torch.no_grad():
        models[broken].lm_head.weight.fill_(torch.nan)
    decoder = RapidDecoder(models["target"], TOKENIZER, models["drafter"])
    sampling = SamplingParams(temperature=temperature, constraint=PERSON)
    with pytest.raises(NumericalError, match="NaN"):
        decoder.generate(
            prompt(), prompt(), sampling=sampling, speculation=SpeculationConfig(gamma=3)
        )


def test_a_grammar_is_compiled_once_for_a_decoder(monkeypatch) -> None:
    decoder = RapidDecoder(model_for_text(), TOKENIZER)
    compiled: list[str] = []
    original = Constraints._compile
    monkeypatch.setattr(
        Constraints, "_compile", lambda self, key: compiled.append(key) or original(self, key)
    )
    for constraint in (PERSON, PERSON, "a|b", json.dumps(PERSON), ["a", "b"], "a|b"):
        sampling = SamplingParams(max_new_tokens=3, constraint=constraint)
        decoder.generate(prompt(), sampling=sampling)
    assert len(compiled) == 3
