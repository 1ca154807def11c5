"""Constraints on the packaged model: acceptance, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import installed, smollm2
from mask_time import ANSWERS, masked_answer
from masked_drafts import compare

from rapid_llm import RapidDecoder
from rapid_llm.cli import main
from rapid_llm.models import LoadedModel
from rapid_llm.speculation.constraints import Constraints

installed("llguidance")
jsonschema = installed("jsonschema")

SCHEMA = {
    "type": "object",
    "properties": {
        "word": {"enum": ["PROPHECY", "PIANO"]},
        "letters": {"type": "integer", "minimum": 1, "maximum": 20},
    },
    "required": ["word", "letters"],
    "additionalProperties": False,
}


@pytest.mark.slow
def test_drafts_are_accepted_under_a_schema_as_often_as_without(
    smollm2_float32: LoadedModel,
) -> None:
    decoder = RapidDecoder(smollm2_float32.model, smollm2_float32.tokenizer)
    free, masked, unmasked = (
        row.stats for row in compare(decoder, 1024, range(6), mode="exact", gamma=4, lookup=False)
    )
    assert masked.acceptance_rate >= free.acceptance_rate
    assert masked.tokens_per_round > unmasked.tokens_per_round


def test_masks_take_less_than_a_tenth_of_a_millisecond_a_token() -> None:
    constraints = Constraints(smollm2())
    for constraint, text in ANSWERS.values():  # compiled once for a decoder
        masked_answer(constraints, constraint, text)
    took = [masked_answer(constraints, constraint, text) for constraint, text in ANSWERS.values()]
    assert sum(seconds for _, seconds, _ in took) / sum(tokens for tokens, *_ in took) < 1e-4


def test_ask_answers_in_the_schema_of_a_file(tmp_path: Path, capsys) -> None:
    installed("chromadb")
    document, schema = tmp_path / "words.txt", tmp_path / "schema.json"
    document.write_text("PROPHECY, n. The art of selling one's credibility. PIANO, n. A utensil.")
    schema.write_text(json.dumps(SCHEMA))
    ask = ["ask", str(document), "--question", "Which word is an art?", "--schema", str(schema)]
    assert main([*ask, "--temperature", "1"]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), SCHEMA)
    assert main([*ask, "--max-new-tokens", "3"]) == 1
    assert "--max-new-tokens" in capsys.readouterr().err
    assert main([*ask, "--max-new-tokens", "3", "--json"]) == 1
    cut = capsys.readouterr()
    assert json.loads(cut.out)["finish_reason"] == "length"
    assert "--max-new-tokens" in cut.err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"type": "object", "uniqueItems": true}', "uniqueItems"),
        ("{type: object}", "no JSON"),
        ("[1]", "no JSON schema"),
        (None, "cannot be read"),
    ],
    ids=str,
)
def test_ask_refuses_a_schema_before_it_reads_or_loads_anything(
    tmp_path: Path, capsys, text: str | None, named: str
) -> None:
    schema = tmp_path / "schema.json"
    if text is not None:
        schema.write_text(text)
    command = ["ask", str(tmp_path / "no such file.txt"), "-q", "?", "--schema", str(schema)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_ask_takes_other_constraints_by_form(tmp_path: Path, capsys) -> None:
    command = ["ask", str(tmp_path / "no such file.txt"), "-q", "?", "--constraint"]
    assert main([*command, "regex=("]) == 2
    assert "unclosed group" in capsys.readouterr().err
    assert main([*command, "regex=[0-9]+"]) == 2
    assert "no such file" in capsys.readouterr().err
    schema = tmp_path / "schema.json"
    schema.write_text("{}")
    assert main([*command, "regex=a", "--schema", str(schema)]) == 2
    assert "exclude each other" in capsys.readouterr().err
