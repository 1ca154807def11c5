"""A model, a tokenizer of text pieces, a schema, and what a constraint allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import installed, tiny_model
from grammar_models import byte_tokenizer

from rapid_llm import RapidDecoder
from rapid_llm.grammars import canonical
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


@pytest.fixture(name="decoder", scope="module")
def decoder_fixture() -> RapidDecoder:
    return RapidDecoder(model_for_text(), TOKENIZER, model_for_text(seed=1))


def prompt(text: str = 'He said {"name":"cook"} and {"name":"co') -> list[int]:
    return TOKENIZER(text).input_ids


def matcher(constraint: Any, tokenizer: Any = TOKENIZER, width: int = WIDTH, **changes) -> Matcher:
    how = {"ends": {tokenizer.eos_token_id}, "least_new_tokens": 0} | changes
    return Constraints(tokenizer).matcher(canonical(constraint), width, **how)


def allowed(of: Matcher, drafted: list[int], width: int = WIDTH) -> list[int]:
    logits = masked(torch.zeros(1, width), of.mask(drafted, 1))
    return logits[0].isfinite().nonzero()[:, 0].tolist()
