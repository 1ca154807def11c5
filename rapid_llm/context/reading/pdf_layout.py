"""Undo page layout in a PDF's text: hyphenation, running headers and footers, dot leaders."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

# Characters that PDFium writes for a hyphen and line end; it does not treat other hyphens so.
_HYPHENS = "\x02\ufffe"
# Begins at the start of a word: matching from inside a long word would take quadratic time.
_LETTERS = r"(?<![^\W\d_])[^\W\d_]"
_DIVIDED = re.compile(
    rf"(?P<one>{_LETTERS}+)(?:[{_HYPHENS}]\n?|[-\u2010\u00ad]\n(?=[^\W\d_]))(?P<two>\w+)"
)
_DIVIDED_BY_PAGE = re.compile(
    rf"(?P<one>{_LETTERS}{{2,}})[-\u2010\u00ad{_HYPHENS}]\n?\f"
    r"(?P<two>[^\W\d_]{2,}[^\w\s]?)\s?"
)
_LEFT_HYPHEN = re.compile(f"[{_HYPHENS}]")
_CONTROL = re.compile(r"[\x00\x01\x03-\x08\x0e-\x1f\x7f]")
_COMPOUND = re.compile(r"(?<!\w)\w+(?:-\w+)+")
_WORD = re.compile(r"\w+")
# "Introduction . . . . . . 5"
_LEADER = re.compile(r"[ \t]?(?:\.(?:[ \t]{0,2}\.){4,}|·(?:[ \t]{0,2}·){4,}|…(?:[ \t]?…)+)[ \t]?")
_LIGATURES = str.maketrans(
    {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"}
)
_NUMBER = re.compile(r"\d{1,6}")
_ROMAN = re.compile(r"m{0,3}(cm|cd|d?c{0,3})(xc|xl|l?x{0,3})(ix|iv|v?i{0,3})")
_ROMAN_DIGITS = {"i": 1, "v": 5, "x": 10, "l": 50, "c": 100, "d": 500, "m": 1000}

_EDGE_LINES = 3  # lines at the top and at the bottom of a page that may be running
_RUNNING_CHARACTERS = 200  # maximum length of a running line
_RUN_PAGES = 3  # minimum number of pages with the line
_RUN_GAP = 2  # maximum distance between them: left and right pages may have different lines

_Key: TypeAlias = tuple[str, str, int | None]


def flowing_text(pages: Sequence[str]) -> list[str]:
    """Remove page layout from the text of pages.

    Args:
        pages: texts of pages from PDFium.

    Returns:
        As many pages. Running lines are removed except the first of each kind, hyphenated words
        are joined (on the page where they begin), dot leaders become one ellipsis.
    """
    lines = [
        [line.strip() for line in _CONTROL.sub("", page.translate(_LIGATURES)).splitlines()]
        for page in pages
    ]
    kept = _without_running_lines(lines)
    text = "\f".join("\n".join(page).strip() for page in kept)
    return _LEADER.sub(" … ", _with_whole_words(text)).split("\f")


# --- divided words -----------------------------------------------------------------------------


def _with_whole_words(text: str) -> str:
    compounds = {word.casefold() for word in _COMPOUND.findall(text)}
    words = {word.casefold() for word in _WORD.findall(text)}

    def joined(one: str, two: str) -> str:
        """Join two halves; keep the hyphen if the text has the compound, or for names."""
        compound = f"{one}-{two}"
        if compound.casefold() in compounds and f"{one}{two}".casefold() not in words:
            return compound
        return compound if two[:1].isupper() or two[:1].isdigit() else f"{one}{two}"

    text = _DIVIDED.sub(lambda match: joined(match["one"], match["two"]), text)
    text = _DIVIDED_BY_PAGE.sub(lambda match: f"{joined(match['one'], match['two'])}\f", text)
    return _LEFT_HYPHEN.sub("-", text).replace("\u00ad", "")


# --- running lines -----------------------------------------------------------------------------


def _without_running_lines(pages: Sequence[list[str]]) -> list[list[str]]:
    kept = [list(page) for page in pages]
    for from_the_top in (True, False):
        edges = [_edge(page, from_the_top) for page in kept]
        running = _running(
            [[page[at] for at in edge] for page, edge in zip(kept, edges, strict=True)]
        )
        for number, edge in enumerate(edges):
            page = kept[number]
            for at in edge:
                first = [running[key] for key in _keys(page[at], number) if key in running]
                starts = [starts[number] for starts in first if number in starts]
                if not starts:
                    break
                if any(start != number for start in starts) or not _has_letters(page[at]):
                    page[at] = ""
    return kept


def _edge(page: Sequence[str], from_the_top: bool) -> list[int]:
    """Indices of the outermost non-blank lines at the top or bottom of a page, outermost first."""
    places = [at for at, line in enumerate(page) if line]
    return places[:_EDGE_LINES] if from_the_top else places[: -_EDGE_LINES - 1 : -1]


def _running(edges: Sequence[Sequence[str]]) -> Mapping[_Key, dict[int, int]]:
    """For the key of each running line: its pages, mapped to the first page of their run."""
    pages: defaultdict[_Key, list[int]] = defaultdict(list)
    for number, lines in enumerate(edges):
        for key in {key for line in lines for key in _keys(line, number)}:
            pages[key].append(number)
    return {
        key: {number: run[0] for run in runs for number in run}
        for key, numbers in pages.items()
        if (runs := [run for run in _runs(numbers) if len(run) >= _RUN_PAGES])
    }


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Split ascending numbers where the gap between neighbours is too large."""
    runs = [[numbers[0]]]
    for before, number in pairwise(numbers):
        if number - before > _RUN_GAP:
            runs.append([])
        runs[-1].append(number)
    return runs


def _keys(line: str, page: int) -> Iterator[_Key]:
    """Keys that a running line shares across pages: its text, or its text around a page number."""
    if len(line) > _RUNNING_CHARACTERS:
        return
    if _has_letters(line):
        yield line, "", None
    for number in _NUMBER.finditer(line):
        yield line[: number.start()], line[number.end() :], int(number[0]) - page
    if line and _ROMAN.fullmatch(line.lower()):
        yield "", "", _roman(line.lower()) - page


def _roman(numeral: str) -> int:
    values = [_ROMAN_DIGITS[digit] for digit in numeral]
    following = [*values[1:], 0]
    return sum(-v if v < after else v for v, after in zip(values, following, strict=True))


def _has_letters(line: str) -> bool:
    return not _ROMAN.fullmatch(line.lower()) and any(map(str.isalpha, line))
