"""Generated JSON schemas: every finished answer is valid, what is refused is refused by name.

``python tests/test_constraints_schemas.py 500`` asks the packaged model for as many answers.
"""

from __future__ import annotations

import json
import re
import sys
from random import Random
from typing import Any

import pytest
import torch
from conftest import installed, smollm2, tiny_model
from grammar_models import byte_tokenizer

from rapid_llm import RapidDecoder, SamplingParams, SpeculationConfig
from rapid_llm.errors import InvalidParameterError

installed("llguidance")
jsonschema = installed("jsonschema")

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?', re.DOTALL)
"""A string of a JSON text, which may be cut."""

NAMES = ("id", "name", "a/b", 'quo"te', "größe", "tags")
REFUSED: dict[str, Any] = {
    "uniqueItems": True,
    "not": {"type": "null"},
    "contains": {"type": "integer"},
    "dependentRequired": {"id": ["name"]},
    "propertyNames": {"maxLength": 3},
    "if": {"type": "object"},
}


def schema(random: Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose instances are short, of all keywords that are enforced."""
    simple = [_string, _integer, _number, _enum, lambda _: {"type": ["boolean", "null"]}]
    if depth == 0 or random.random() < 0.3:
        return random.choice(simple)(random)
    return random.choice([_object, _object, _array, _any_of, _all_of])(random, depth - 1)


def _string(random: Random) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "string", "maxLength": random.randint(1, 6)}
    if random.random() < 0.3:
        made["minLength"] = random.randint(0, made["maxLength"])
    if random.random() < 0.4:
        patterns = ["^[a-c]{1,4}$", r"^\d{2}-\d", "x|yz?$", "[^a]$", "ü"]
        return {"type": "string", "pattern": random.choice(patterns), "maxLength": 8}
    if random.random() < 0.2:
        return {"type": "string", "format": random.choice(["date", "time", "ipv4", "uuid"])}
    return made


def _integer(random: Random) -> dict[str, Any]:
    low = random.randint(-200, 200)
    made: dict[str, Any] = {
        "type": "integer",
        "minimum": low,
        "maximum": low + random.randint(0, 300),
    }
    if random.random() < 0.2:
        made = {"type": "integer", "multipleOf": random.choice([2, 5]), "minimum": 0, "maximum": 99}
    if random.random() < 0.2:
        made["exclusiveMaximum"] = made.pop("maximum") + 1
    return made


def _number(random: Random) -> dict[str, Any]:
    low = random.choice([-1.5, 0, 2.25])
    return {"type": "number", "minimum": low, "maximum": low + random.choice([0.5, 10])}


def _enum(random: Random) -> dict[str, Any]:
    values = ["red", "größe", 'a"b\\', "", 3, -0.5, None, True, [1, "x"], {"k": []}]
    if random.random() < 0.3:
        return {"const": random.choice(values)}
    return {"enum": random.sample(values, random.randint(1, 4))}


def _object(random: Random, depth: int) -> dict[str, Any]:
    names = random.sample(NAMES, random.randint(1, 3))
    made: dict[str, Any] = {
        "type": "object",
        "properties": {name: schema(random, depth) for name in names},
        "required": random.sample(names, random.randint(0, len(names))),
        "additionalProperties": random.choice([False, False, {"type": "integer", "minimum": 0,
                                                               "maximum": 9}]),
    }  # fmt: skip
    if random.random() < 0.2:
        made["patternProperties"] = {"^x": _integer(random)}
    if made["additionalProperties"] is not False:
        made["maxProperties"] = len(names) + 1
        if random.random() < 0.5:
            del made["maxProperties"]
    if random.random() < 0.3:
        made["minProperties"] = random.randint(0, 2)
    return made


def _array(random: Random, depth: int) -> dict[str, Any]:
    most = random.randint(0, 3)
    made: dict[str, Any] = {"type": "array", "items": schema(random, depth), "maxItems": most}
    if random.random() < 0.4:
        made["minItems"] = random.randint(0, most)
    if random.random() < 0.3:
        made["prefixItems"] = [schema(random, 0), schema(random, 0)]
        if random.random() < 0.5:
            made["items"] = False
    return made


def _any_of(random: Random, depth: int) -> dict[str, Any]:
    either = [schema(random, depth), schema(random, depth)]
    return {random.choice(["anyOf", "anyOf", "oneOf"]): either}


def _all_of(random: Random, depth: int) -> dict[str, Any]:
    if random.random() < 0.5:
        name = f"node{random.randrange(10_000)}"
        return {"$defs": {name: schema(random, depth)}, "$ref": f"#/$defs/{name}"}
    return {"allOf": [_object(random, 0), {"required": [random.choice(NAMES)]}]}


def with_refused(random: Random, made: dict[str, Any]) -> dict[str, Any]:
    """Now and then a keyword that cannot be enforced, somewhere inside; definitions at the root."""
    if random.random() < 0.1:
        name = random.choice(list(REFUSED))
        made = {"type": "object", "properties": {"inner": {**made, name: REFUSED[name]}}}
    definitions: dict[str, Any] = {}
    made = _without_definitions(made, definitions)
    return {**made, "$defs": definitions} if definitions else made


def _without_definitions(value: Any, found: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_without_definitions(each, found) for each in value]
    if not isinstance(value, dict):
        return value
    inside = {key: _without_definitions(each, found) for key, each in value.items()}
    found.update(inside.pop("$defs", {}))
    return inside


def words_of(value: Any) -> set[str]:
    """Keys of a schema, at any depth."""
    if isinstance(value, dict):
        return {*value, *(word for each in value.values() for word in words_of(each))}
    if isinstance(value, list):
        return {word for each in value for word in words_of(each)}
    return set()


def sampling_for(made: dict[str, Any], seed: int, new: int) -> SamplingParams | None:
    """Sampling under a schema; None where it is refused, by one of its keywords."""
    try:
        return SamplingParams(
            temperature=1.0, seed=seed, max_new_tokens=new, constraint={"json": made}
        )
    except InvalidParameterError as refused:
        message = str(refused)
    named = [w for w in words_of(made) if re.search(rf"(?<!\w){re.escape(w)}(?!\w)", message)]
    assert named or "Unsatisfiable" in message, f"{made}: {message}"
    return None


def check(decoder: RapidDecoder, count: int, first: int, new: int, prompt: str) -> dict[str, int]:
    """Sample an answer for each generated schema; counts of what happened."""
    counts = {"stop": 0, "length": 0, "refused": 0}
    ways: list[dict[str, Any]] = [
        {"mode": "exact", "gamma": "auto"},
        {"mode": "paper", "gamma": 4},
        {"mode": "augmented", "gamma": 2},
        {"drafting": "rest", "gamma": 4},
    ]
    for seed in range(first, first + count):
        random = Random(seed)
        made = with_refused(random, schema(random))
        sampling = sampling_for(made, seed, new)
        if sampling is None:
            counts["refused"] += 1
            continue
        result = decoder.generate(
            prompt, prompt, sampling=sampling, speculation=SpeculationConfig(**ways[seed % 4])
        )
        counts[result.finish_reason] += 1
        if result.finish_reason == "stop":
            jsonschema.Draft202012Validator(made).validate(json.loads(result.text))
        between = _STRING.sub("", result.text)  # what a string holds is the model's own affair
        assert not re.search(r"[ \t\n\r]{20}", between), (made, result.text)
    return counts


def test_answers_of_a_random_model_are_valid() -> None:
    """A model that says any byte, valid UTF-8 or not."""
    tokenizer = byte_tokenizer(['{"', '":', '",', '"}', "Ġ{", "ĠĠ"])
    own = {"vocab_size": 280, "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.1}
    decoder = RapidDecoder(tiny_model(**own), tokenizer, tiny_model(seed=1, **own))
    counts = check(decoder, 60, 0, 150, "Give it.")
    assert counts["stop"] > 30
    assert counts["refused"] > 2


def test_answers_in_a_real_vocabulary_are_valid() -> None:
    """The packaged tokenizer, of 49,152 tokens, and a random model."""
    tokenizer = smollm2()
    own = {"vocab_size": 49_152, "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.1}
    own |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    with torch.no_grad():
        decoder = RapidDecoder(tiny_model(**own), tokenizer)
    counts = check(decoder, 15, 1000, 120, "Give it.")
    assert counts["stop"] > 5


@pytest.mark.slow
def test_answers_of_the_packaged_model_are_valid() -> None:
    counts = check_packaged(120)
    assert counts["stop"] > 60
    assert counts["refused"] > 5


def check_packaged(count: int) -> dict[str, int]:
    decoder = RapidDecoder.from_pretrained("smollm2-135m", dtype="bfloat16", device="cpu")
    return check(decoder, count, 0, 160, "Describe the red car in JSON:")


if __name__ == "__main__":
    print(check_packaged(int(sys.argv[1])))
