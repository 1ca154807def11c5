"""Forms of a constraint on answers (JSON schema, regex, choices, grammar), as one grammar each.

A constraint is kept as a mapping with one key, in vLLM's terms: ``json`` (a JSON schema),
``regex``, ``choice`` (a list of strings) or ``grammar`` (Lark or GBNF). llguidance reads it as one
grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from rapid_llm.errors import InvalidParameterError, MissingDependencyError
from rapid_llm.grammar_limits import (
    in_deep_stack,
    is_of_size,
    too_deep,
    too_large,
    too_large_for_llguidance,
)
from rapid_llm.json_schemas import simplify, subschemas, unenforceable

if TYPE_CHECKING:
    from llguidance import LLTokenizer

Form = Literal["json", "regex", "choice", "grammar"]
FORMS: tuple[Form, ...] = get_args(Form)

ANY_OBJECT = {"type": "object"}
"""Schema of the constraint ``"json"``: any JSON object."""

_GRAMMAR = re.compile(r"^\s*(%llguidance\b|start\s*:|root\s*::=)", re.MULTILINE)
"""Beginning of a Lark grammar, and the main rule of a Lark or GBNF grammar."""

_JSON_OPTIONS: Any = {
    # Without an upper limit a model can write white space until max_new_tokens.
    "whitespace_flexible": True,
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,8}",
    "coerce_one_of": False,
    "lenient": False,
    # With u, a property's name could be written as another: "\\u0061" is no property "a" to
    # llguidance, whose value may then be anything.
    "json_allowed_escapes": 'nrbtf\\"',
}
_CONTROL = re.compile(r"\\u00(?:[01]|7f)")
"""Control characters in JSON text that only the escape u can write."""

_SHOWN = 100  # characters at each end of a long message


def canonical(given: Any) -> dict[str, Any] | None:
    """The canonical form of a constraint: a mapping from its :data:`Form` to plain JSON values.

    Args:
        given: None; a mapping with one of the four forms as its only key; a JSON schema, as a
            mapping or as JSON text; a pydantic class; ``"json"`` for any JSON object; a list of
            strings to choose from; a grammar, told by its rule ``start:`` (Lark) or ``root ::=``
            (GBNF); any other text or a compiled pattern is a regular expression, which the whole
            answer matches.

    Raises:
        InvalidParameterError: it is none of these, is malformed, or cannot be enforced.
        MissingDependencyError: llguidance is not installed.
    """
    if given is None:
        return None
    form, value = _sorted(given)
    made: dict[str, Any] = {form: _VALUES[form](value)}
    _require_readable(form, made[form])
    llguidance_grammar(json.dumps(made))
    return made


def _sorted(given: Any) -> tuple[Form, Any]:
    if isinstance(given, str):
        text = given.strip()
        if text == "json":
            return "json", ANY_OBJECT
        if text.startswith("{") and (schema := _parsed(text)) is not None:
            return _sorted(schema)
        return ("grammar" if _GRAMMAR.search(given) else "regex"), given
    if isinstance(given, re.Pattern):
        return "regex", given
    if hasattr(given, "model_json_schema"):
        return "json", given
    if isinstance(given, Mapping):
        forms = [form for form in FORMS if form in given]
        if not forms:
            return "json", given
        if len(given) == 1:
            return forms[0], given[forms[0]]
        raise InvalidParameterError(
            f"constraint has the keys {', '.join(map(repr, given))}: give one of "
            f"{', '.join(FORMS)}, or put a JSON schema under 'json'"
        )
    if isinstance(given, Sequence) and not isinstance(given, bytes):
        return "choice", given
    raise InvalidParameterError(
        f"constraint={given!r} is not allowed: constraint must be a JSON schema, a pydantic class, "
        "'json', a regular expression, a list of strings, a Lark or GBNF grammar, or None"
    )


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


# --- values of the four forms ------------------------------------------------------------------


def _json(value: Any) -> Any:
    if hasattr(value, "model_json_schema"):
        try:
            value = value.model_json_schema()
        except Exception as error:  # pydantic's own, for fields that JSON cannot hold
            raise _unusable("json", error) from error
    if value == "object":
        value = ANY_OBJECT
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _unusable("json", f"the schema is no JSON: {error}") from error
    if value is True:
        return {}
    try:
        schema = json.loads(json.dumps(value, allow_nan=False))
    except RecursionError as error:
        raise _unusable("json", too_deep("too many")) from error
    except (TypeError, ValueError) as error:
        raise _unusable("json", f"the schema is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise _unusable("json", f"{value!r} is no JSON schema: give a mapping with its keywords")
    _require_readable("json", schema)
    for each in subschemas(schema):
        if problem := unenforceable(each):
            raise _unusable("json", problem)
        simplify(each)
    return schema


def _regex(value: Any) -> str:
    if isinstance(value, re.Pattern):
        flags = {re.I: "i", re.S: "s", re.M: "m", re.X: "x"}
        letters = "".join(letter for flag, letter in flags.items() if value.flags & flag)
        letters += "-u" if value.flags & re.A else ""
        value = f"(?{letters}){value.pattern}" if letters else value.pattern
    return _text("regex", value)


def _text(form: Form, value: Any) -> str:
    if not isinstance(value, str):
        raise _unusable(form, f"{value!r} is no text")
    return value


def _choice(value: Any) -> list[str]:
    texts = [] if isinstance(value, str | bytes) or not isinstance(value, Sequence) else list(value)
    if not texts or not all(isinstance(each, str) for each in texts):
        raise _unusable("choice", f"{value!r} is no list of strings to choose from")
    return texts


_VALUES = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": lambda value: _text("grammar", value),
}


def _require_readable(form: Form, value: Any) -> None:
    """Refuse what is too large, and text that is no Unicode."""
    if problem := too_large(form, value, len(json.dumps(value))):
        raise _unusable(form, problem)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        lone = error.object[error.start]
        raise _unusable(
            form, f"it has the lone surrogate {lone!r}, which is no character: remove it"
        ) from error


# --- the grammar ---------------------------------------------------------------------------------


def inline_json(schema: Any) -> str:
    """A JSON schema as an expression in a Lark grammar: ``%json {…}`` with limited white space.

    Args:
        schema: schema as in :func:`canonical`, or a pydantic class.

    Raises:
        InvalidParameterError: it cannot be enforced.
    """
    canonical({"json": schema})
    checked = _json(schema)
    return "%json " + json.dumps({**checked, "x-guidance": _json_options(checked)})


def _json_options(schema: dict[str, Any]) -> Any:
    """llguidance's options for a schema."""
    if not _CONTROL.search(json.dumps(schema)):
        return _JSON_OPTIONS
    return {**_JSON_OPTIONS, "json_allowed_escapes": _JSON_OPTIONS["json_allowed_escapes"] + "u"}


@lru_cache(maxsize=256)
def llguidance_grammar(constraint: str) -> str:
    """The grammar of a canonical constraint, in llguidance's own text form.

    Args:
        constraint: the canonical constraint as JSON text.

    Raises:
        InvalidParameterError: it cannot be enforced; the message names the keyword, or the place.
        MissingDependencyError: llguidance is not installed.
    """
    ((form, value),) = json.loads(constraint).items()
    try:
        from llguidance import LLMatcher, grammar_from
    except ImportError as error:
        raise MissingDependencyError(
            f"a constraint needs the package llguidance, which cannot be imported ({error}): "
            'run pip install "rapid-llm[structured]"'
        ) from error
    try:
        if form == "json":
            grammar = LLMatcher.grammar_from_json_schema(value, overrides=_json_options(value))
        elif form == "regex":
            grammar = LLMatcher.grammar_from_regex(_without_anchors(value))
        elif form == "choice":
            grammar = grammar_from("lark", "start: ANY\nANY: " + " | ".join(map(json.dumps, value)))
        elif value.lstrip().startswith('{"grammars"'):
            grammar = value
        else:
            grammar = grammar_from("grammar", value)
    except ValueError as refused:  # of GBNF, and of JSON that is no grammar
        raise _unusable(form, refused) from refused
    problem = in_deep_stack(lambda: LLMatcher.validate_grammar(grammar) or _nothing_begins(grammar))
    if problem:
        raise _unusable(form, too_large_for_llguidance(form, value, len(constraint), problem))
    return grammar


def _nothing_begins(grammar: str) -> str:
    """Why no answer can begin, such as a rule that is nothing but itself; "" if one can."""
    from llguidance import LLMatcher

    matcher = LLMatcher(_bytes(), grammar, log_level=0)
    if error := matcher.get_error():
        # Other errors are of tokens that only a model's own tokenizer has.
        return error if is_of_size(error) else ""
    matcher.compute_bitmask()
    if not (error := matcher.get_error()):
        return ""
    if is_of_size(error):
        return error
    return "no text satisfies it; look for a $ref or a rule to itself alone"


@lru_cache(maxsize=1)
def _bytes() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _without_anchors(regex: str) -> str:
    """Drop ``^`` and ``$`` at the ends, as the whole answer matches in any case."""
    regex = regex.removeprefix("^")
    escapes = re.search(r"(\\*)\$$", regex)
    return regex[:-1] if escapes and len(escapes[1]) % 2 == 0 else regex


def _unusable(form: str, problem: object) -> InvalidParameterError:
    what = {
        "json": "the JSON schema",
        "regex": "the regular expression",
        "choice": "the list of choices",
        "grammar": "the grammar",
    }[form]
    return InvalidParameterError(f"constraint: {what} cannot be enforced: {one_line(problem)}")


def one_line(problem: object) -> str:
    """A message in one short line: for a regular expression the expression and its error."""
    text = str(problem).strip().partition(". Enable 'coerce_one_of'")[0]
    lines = [line.strip() for line in text.splitlines()] or [type(problem).__name__]
    line = lines[0].removesuffix(":")
    found = next((line for line in lines if line.startswith("error: ")), None)
    if found is not None and "regex parse error" in text:
        after = next(i for i, line in enumerate(lines) if line.endswith("regex parse error:"))
        line = f"pattern {lines[after + 1]!r}: {found.removeprefix('error: ')}"
    return line if len(line) <= 2 * _SHOWN else f"{line[:_SHOWN]} … {line[-_SHOWN:]}"
