"""Constraints that are too large or too deep: refused by name, before they take long or crash.

llguidance compiles in time that can grow with the square of a grammar's length, and by functions
that call themselves, once for each rule in a chain of rules.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

MAX_CHARACTERS = 1_000_000
"""Maximum length of a constraint, as JSON text."""

MAX_GBNF_CHARACTERS = 100_000
"""Maximum length of a GBNF grammar, which is translated first."""

MAX_DEPTH = 120
"""Maximum depth of lists and mappings in a JSON schema; llguidance reads 128 with its own."""

MAX_ENTRIES = {"patternProperties": 100, "required": 10_000}
"""Maximum number of entries of a keyword, where the time of llguidance grows with its square."""

GBNF = re.compile(r"^\s*root\s*::=", re.MULTILINE)
"""The main rule of a GBNF grammar."""

_STACK_BYTES = 512 * 2**20
"""Stack for the longest chain of rules; memory is taken only for what is used of it."""

_TOO_LARGE = re.compile(r"(?<!range end )too (?:big|large|complex)|fuel|u16::MAX")
"""In llguidance's messages about grammars beyond its limits."""

_starting = threading.Lock()


def in_deep_stack(run: Callable[[], T]) -> T:
    """Call a function where deep recursion of compiled code does not end the process."""
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(run())
        except BaseException as error:
            outcome.set_exception(error)

    with _starting:
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=work, daemon=True).start()
        except RuntimeError:  # the address space is limited
            return run()
        finally:
            threading.stack_size(before)
    return outcome.result()


def too_large(form: str, value: Any, length: int) -> str | None:
    """What is wrong with a constraint that is longer or deeper than allowed; None if it is not.

    Args:
        form: form of the constraint.
        value: its value, of plain JSON.
        length: its length in characters.
    """
    gbnf = form == "grammar" and GBNF.search(value)
    limit = MAX_GBNF_CHARACTERS if gbnf else MAX_CHARACTERS
    if length > limit:
        return _size(form, value, length, f"at most {limit:,} characters are allowed")
    depth = _depth(value)
    if depth > MAX_DEPTH:
        return too_deep(str(depth))
    return None


def too_deep(levels: str) -> str:
    """Message about a JSON schema of so many levels."""
    return (
        f"it is nested {levels} levels deep, and at most {MAX_DEPTH} are allowed; put inner "
        "schemas under '$defs' and refer to them by '$ref'"
    )


def too_many_entries(schema: Mapping[str, Any]) -> str | None:
    """What is wrong with a keyword of a JSON schema that has too many; None if none has."""
    for keyword, limit in MAX_ENTRIES.items():
        entries = schema.get(keyword)
        if isinstance(entries, dict | list) and len(entries) > limit:
            return (
                f"it has {len(entries):,} values under {keyword!r}, and at most {limit:,} are "
                "allowed; give fewer"
            )
    return None


def is_of_size(problem: str) -> bool:
    """Whether a message of llguidance is about its limits."""
    return _TOO_LARGE.search(problem) is not None


def too_large_for_llguidance(form: str, value: Any, length: int, problem: str) -> str:
    """llguidance's message, with the size and a remedy where it is about a limit."""
    if not is_of_size(problem):
        return problem
    known = problem.partition("\n")[0]
    reason = "more than 65,525 symbols" if "u16::MAX" in known else known
    return _size(form, value, length, f"llguidance takes no more ({reason})")


def _size(form: str, value: Any, length: int, limit: str) -> str:
    parts, remedy = "", "shorten it"
    if form == "choice":
        parts = f"{len(value):,} choices and "
        remedy = "give fewer or shorter choices, or a regular expression for them"
    elif form == "json" and (largest := _largest(value)) is not None:
        keyword, count = largest
        parts = f"{count:,} values under {keyword!r} and "
        instead = ", or a 'pattern' for them" if keyword == "enum" else ""
        remedy = f"give fewer or shorter ones{instead}"
    return f"it has {parts}{length:,} characters, and {limit}; {remedy}"


def _largest(value: Any) -> tuple[str, int] | None:
    """Key and length of the longest list or mapping in JSON; None if none has two entries."""
    largest: tuple[str, int] | None = None
    left = [("", value)]
    while left:
        key, each = left.pop()
        if not isinstance(each, dict | list):
            continue
        if key and len(each) > (1 if largest is None else largest[1]):
            largest = key, len(each)
        inside = each.items() if isinstance(each, dict) else [(key, one) for one in each]
        left += [(name, one) for name, one in inside if isinstance(one, dict | list)]
    return largest


def _depth(value: Any) -> int:
    """Levels of lists and mappings in JSON."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [
            one for each in level for one in (each.values() if isinstance(each, dict) else each)
        ]
    return depth
