"""Constraints that are too large or too deep are refused in one line, and never end the process."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from conftest import installed
from grammar_models import byte_tokenizer

from rapid_llm import SamplingParams
from rapid_llm.errors import InvalidParameterError
from rapid_llm.grammars import canonical
from rapid_llm.speculation.constraints import Constraints

installed("llguidance")

TOKENIZER = byte_tokenizer([])


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (
            {"enum": [f"value {i}" for i in range(200_000)]},
            ["200,000", "'enum'", "1,000,000", "fewer or shorter"],
        ),
        (
            {"enum": [{"a": i} for i in range(40_000)]},
            ["40,000", "'enum'", "llguidance", "'pattern'"],
        ),
        ({"const": "x" * 2_000_000}, ["2,000,0", "1,000,000", "shorten it"]),
        (
            {"type": "object", "required": [f"p{i}" for i in range(10_001)]},
            ["10,001", "'required'", "10,000", "give fewer"],
        ),
        (
            {"patternProperties": {f"^p{i}": {} for i in range(101)}},
            ["101", "'patternProperties'", "at most 100", "give fewer"],
        ),
        (nested(150), ["151 levels", "at most 120", "'$defs'"]),
        (nested(900), ["levels deep", "at most 120", "'$defs'"]),
        (
            [f"choice {i}" for i in range(200_000)],
            ["200,000 choices", "1,000,000", "fewer or shorter"],
        ),
        ("|".join(f"value {i}" for i in range(200_000)), ["1,000,000", "shorten it"]),
        ("(" * 500 + "a" + ")" * 500, ["pattern '((((", "…", "nested parentheses"]),
        (
            "start: " + " | ".join(f'"value {i}"' for i in range(100_000)),
            ["1,000,000", "shorten it"],
        ),
        (
            "root ::= " + " | ".join(f'"value {i}"' for i in range(20_000)),
            ["100,000", "shorten it"],
        ),
    ],
    ids=lambda each: str(each)[:24],
)
def test_what_is_too_large_is_refused_in_one_line_with_its_size_the_limit_and_a_remedy(
    given: Any, named: list[str]
) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        SamplingParams(constraint=given)
    message = str(caught.value)
    assert len(message) < 350
    assert "\n" not in message
    for part in named:
        assert part in message


@pytest.mark.parametrize(
    "given",
    [
        {"enum": ["a", "\ud800"]},
        {"properties": {"\ud800": {}}},
        ["\ud800"],
        "\ud800",
        'start: "\ud800"',
    ],
    ids=["value", "name", "choice", "expression", "grammar"],
)
def test_a_lone_surrogate_is_named(given: Any) -> None:
    with pytest.raises(InvalidParameterError, match=r"lone surrogate '\\ud800', .* remove it"):
        SamplingParams(constraint=given)


@pytest.mark.parametrize(
    ("rules", "chain"),
    [
        (
            3_000,
            """{"$ref": "#/$defs/r0", "$defs": {
            **{f"r{i}": {"anyOf": [{"type": "null"}, {"items": {"$ref": f"#/$defs/r{i + 1}"}}]}
               for i in range(n)}, f"r{n}": {"type": "null"}}}""",
        ),
        (
            5_000,
            """{"$ref": "#/$defs/r0", "$defs": {
            **{f"r{i}": {"$ref": f"#/$defs/r{i + 1}"} for i in range(n)}, f"r{n}": {}}}""",
        ),
        (
            5_000,
            r"""'start: r0\n' + ''.join(f'r{i}: "a" r{i+1}\n' for i in range(n)) + f'r{n}: "b"'""",
        ),
        (
            5_000,
            r"""'start: R0\n' + ''.join(f'R{i}: "a" R{i+1}\n' for i in range(n)) + f'R{n}: "b"'""",
        ),
    ],
    ids=["schemas within schemas", "references", "rules", "terminals"],
)
def test_a_long_chain_of_rules_does_not_end_the_process(rules: int, chain: str) -> None:
    code = f"""
from grammar_models import byte_tokenizer
from rapid_llm import SamplingParams
from rapid_llm.speculation.constraints import Constraints
n = {rules}
constraint = SamplingParams(constraint={chain}).constraint
matcher = Constraints(byte_tokenizer([])).matcher(constraint, 300, {{256}}, 0)
print("may begin", bool(matcher.mask([], 1).any()))
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, cwd="tests", timeout=300)
    assert done.returncode == 0, done.stderr[-300:]
    assert "may begin True" in done.stdout


def test_a_grammar_of_tokens_that_only_a_model_has_is_not_too_large() -> None:
    assert SamplingParams(constraint="start: <[100000-100010]>").constraint


def test_many_choices_are_followed_to_the_one_that_is_chosen() -> None:
    choices = [*(f"choice {i}" for i in range(5_000)), "", "é|(\\\n", "choice"]
    matcher = Constraints(TOKENIZER).matcher(canonical(choices) or {}, 300, {256}, 0)
    for text in ("choice 4711", "é|(\\\n"):
        ids = TOKENIZER(text, add_special_tokens=False).input_ids
        assert matcher.legal([], ids) == ids
        assert matcher.over(ids)
    assert (
        matcher.legal([], TOKENIZER("choice 5711", add_special_tokens=False).input_ids)[-1:]
        == (TOKENIZER("choice 571", add_special_tokens=False).input_ids[-1:])
    )
