"""JSON schemas as llguidance enforces them: what it ignores is refused, or written otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rapid_llm.grammar_limits import too_many_entries

_SCHEMAS = ("items", "additionalItems", "additionalProperties", "contains", "not", "if", "then",
            "else", "propertyNames", "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_LISTS_OF_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPPINGS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions",
                        "dependentSchemas")  # fmt: skip
_OTHER_KEYWORDS = (
    "type", "enum", "const", "$ref", "$dynamicRef", "$recursiveRef", "$schema", "$id", "id",
    "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$comment", "$vocabulary", "title",
    "description", "default", "examples", "example", "readOnly", "writeOnly", "deprecated",
    "nullable", "discriminator", "x-guidance",
    "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "uniqueItems", "minContains",
    "maxContains", "required", "minProperties", "maxProperties", "dependencies",
    "dependentRequired", "contentEncoding", "contentMediaType", "contentSchema",
)  # fmt: skip
_KEYWORDS = {*_SCHEMAS, *_LISTS_OF_SCHEMAS, *_MAPPINGS_OF_SCHEMAS, *_OTHER_KEYWORDS}
_OUTDATED = ("divisibleBy", "disallow", "extends")  # of draft 3; llguidance ignores them
_NO_CONDITION = ("binary", "password", "path")  # formats that every string has
_NOTHING = {"uniqueItems": False, "propertyNames": True, "unevaluatedItems": True,
            "unevaluatedProperties": True}  # fmt: skip
"""Values of keywords that demand nothing; llguidance knows the keywords not at all."""
_NOT_SIGNS_ALONE = "^(?!^[-+.]*$)"
"""Beginning of pydantic's pattern of a Decimal."""


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all schemas in it; values that are no schemas are left to llguidance."""
    if not isinstance(schema, dict):
        return
    yield schema
    inside = [schema.get(key) for key in _SCHEMAS]
    for key in _LISTS_OF_SCHEMAS:
        inside += each if isinstance(each := schema.get(key), list) else []
    for key in _MAPPINGS_OF_SCHEMAS:
        inside += each.values() if isinstance(each := schema.get(key), dict) else []
    for each in inside:
        yield from subschemas(each)


def unenforceable(schema: dict[str, Any]) -> str | None:
    """What llguidance accepts of a schema and does not enforce; None if there is nothing."""
    if schema and not schema.keys() & _KEYWORDS:
        return f"{schema!r} is no JSON schema: none of its keys is a keyword, such as 'type'"
    if problem := too_many_entries(schema):
        return problem
    for keyword in _OUTDATED:
        if keyword in schema:
            return f"the keyword {keyword!r} of JSON schema's draft 3 is unknown"
    for keyword in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(schema.get(keyword), bool):
            return f"{keyword!r} is no number, as it is since draft 6"
    least, required = schema.get("minProperties"), schema.get("required") or ()
    if isinstance(least, int) and least > max(1, len(required)):
        # A name may be written twice, and counts once.
        return (
            f"minProperties={least} cannot be enforced beyond the {len(required)} required "
            "properties: name the properties in 'required'"
        )
    return None


def simplify(schema: dict[str, Any]) -> None:
    """Write a schema in keywords that llguidance knows, without a change of what it allows."""
    if schema.get("format") in _NO_CONDITION:
        del schema["format"]
    for keyword, nothing in _NOTHING.items():
        if schema.get(keyword) is nothing:
            del schema[keyword]
    pattern, both = schema.get("pattern"), schema.get("allOf", [])
    if isinstance(pattern, str) and pattern.startswith(_NOT_SIGNS_ALONE) and isinstance(both, list):
        schema["pattern"] = "^" + pattern.removeprefix(_NOT_SIGNS_ALONE)
        schema["allOf"] = [*both, {"pattern": "[^-+.]"}]
    branches = schema.get("oneOf")
    if not isinstance(branches, list):
        return
    if _are_different_values(branches) and "anyOf" not in schema:
        schema["anyOf"] = schema.pop("oneOf")
    tag = schema.get("discriminator")
    name = tag.get("propertyName") if isinstance(tag, dict) else None
    if isinstance(name, str):
        # The tag is required by what the keyword means. llguidance sees that the branches exclude
        # each other where it is required, and pydantic does not say so of tags with a default.
        for branch in branches:
            if isinstance(branch, dict):
                branch["required"] = list(dict.fromkeys([*(branch.get("required") or ()), name]))


def _are_different_values(branches: list[Any]) -> bool:
    """Whether each of some schemas allows values of its own: numbers, texts, true, false, null."""
    values: list[Any] = []
    for branch in branches:
        if not isinstance(branch, dict) or not branch.keys() & {"const", "enum"}:
            return False
        own = [branch["const"]] if "const" in branch else branch["enum"]
        if not isinstance(own, list) or any(isinstance(each, dict | list) for each in own):
            return False
        values += {(isinstance(each, bool), each) for each in own}
    return len(set(values)) == len(values)
