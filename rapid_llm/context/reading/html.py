"""The text of an HTML page, laid out as a browser shows it, in one pass over its events.

No tree is built: how deep elements are nested or how many siblings there are makes no difference,
so the time grows with the size of the page alone, whatever its shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from rapid_llm.errors import MissingDependencyError

# fmt: off
_UNREAD = frozenset((
    "audio", "canvas", "datalist", "iframe", "noscript", "object", "script", "style", "svg",
    "template", "video",
))
_BLOCKS = frozenset((
    "address", "article", "aside", "blockquote", "body", "details", "dialog", "div", "dl",
    "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6",
    "header", "hgroup", "hr", "legend", "main", "menu", "nav", "ol", "p", "pre", "search",
    "section", "summary", "table", "title", "ul", "xmp",
))
_LINES = frozenset(("caption", "dd", "dt", "li", "option", "optgroup", "tr"))
# fmt: on
_LISTS = frozenset(("dl", "menu", "ol", "ul"))
_CELLS = frozenset(("td", "th"))
_KEPT_BLANKS = frozenset(("pre", "textarea", "xmp", "listing"))

# Browsers go on with HTML where one of these is in a drawing.
_NOT_IN_SVG = _BLOCKS - {"title"}

_BLANKS = re.compile(r"\s+")


def html_text(page: str) -> str:
    r"""The text of a page.

    Blocks stand between blank lines, list items, table rows and ``<br>`` begin lines, cells are
    separated by tabs; ``<pre>`` is kept as it is. Scripts, styles and what is hidden are left out,
    and so are menus (``<nav>``), unless they hold most of the page.

    Raises:
        MissingDependencyError: lxml is not installed.
    """
    try:
        from lxml import etree
    except ImportError as error:
        raise MissingDependencyError(
            'HTML is read by the package lxml; run: pip install "rapid-llm[documents]"'
        ) from error
    parser = etree.HTMLParser(target=_Layout(), encoding="utf-8", huge_tree=True)
    parser.feed(page.replace("\0", "").encode())
    text: str = parser.close()
    return text


class _Layout:
    """Takes the parser's events, and writes text.

    White space is not written before the text that it precedes, so that a break takes the place of
    the blanks around it.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._breaks = 0  # newlines before the next text
        self._tabs = 0  # else, ends of cells
        self._blank = False  # else, white space
        self._unread: list[str] = []  # open elements of one that is not read
        self._verbatim = 0  # open elements that keep their white space
        self._begins_verbatim = False
        self._items = 0  # open list items
        self._begins_cell = False  # nothing was written in this cell yet
        self._menus: list[int] = []  # where open menus begin in the pieces
        self._menu_spans: list[tuple[int, int]] = []

    # --- what the parser calls ----------------------------------------------------------------

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        if self._unread[:1] == ["svg"] and tag in _NOT_IN_SVG:
            self._unread.clear()  # it was not closed
        if self._unread or tag in _UNREAD or _hidden(attributes):
            self._unread.append(tag)
            return
        if tag == "br":
            self._break(min(self._breaks + 1, 2))
        elif tag in _CELLS:
            if self._breaks == 0:
                self._blank = False
            self._begins_cell = True
        else:
            self._break_around(tag)
        if tag == "li":
            self._items += 1
        if tag in _KEPT_BLANKS:
            self._verbatim += 1
            self._begins_verbatim = True
        if tag == "nav":
            self._menus.append(len(self._pieces))

    def end(self, tag: str) -> None:
        if self._unread:
            self._unread.pop()
            return
        if tag == "li":
            self._items -= 1
        if tag in _KEPT_BLANKS:
            self._verbatim -= 1
        if tag in _CELLS:
            self._breaks, self._blank, self._begins_cell = 0, False, False
            self._tabs += 1
        elif tag != "br":
            if tag == "tr":
                self._begins_cell = False
            self._break_around(tag)
        if tag == "nav" and self._menus:
            begin = self._menus.pop()
            if not self._menus:
                self._menu_spans.append((begin, len(self._pieces)))

    def data(self, text: str) -> None:
        if self._unread:
            return
        if self._verbatim:
            if self._begins_verbatim:
                text = text.removeprefix("\n")
                self._begins_verbatim = False
            if text:
                self._write(text)
            return
        core = text.strip()
        self._blank |= not core or text[0].isspace()
        if core:
            self._write(_BLANKS.sub(" ", core))
            self._blank = text[-1].isspace()

    def comment(self, text: str) -> None:
        pass

    def close(self) -> str:
        whole = "".join(self._pieces)
        read = "".join(self._outside_menus())
        if 2 * len(read.strip()) < len(whole.strip()):
            read = whole
        lines = "\n".join(line.rstrip() for line in read.replace("\u00ad", "").split("\n"))
        return re.sub(r"\n{3,}", "\n\n", lines).strip("\n")

    # --- layout -------------------------------------------------------------------------------

    def _break_around(self, tag: str) -> None:
        if tag in _LINES or (tag in _LISTS and self._items):
            self._break(1)
        elif tag in _BLOCKS:
            self._break(2)

    def _break(self, newlines: int) -> None:
        if not self._begins_cell:
            self._breaks = max(self._breaks, newlines)

    def _write(self, text: str) -> None:
        if self._breaks:
            self._pieces.append("\n" * self._breaks)
        elif self._tabs:
            self._pieces.append("\t" * self._tabs)
        elif self._blank:
            self._pieces.append(" ")
        self._breaks, self._tabs, self._blank, self._begins_cell = 0, 0, False, False
        self._pieces.append(text)

    def _outside_menus(self) -> Iterator[str]:
        last = 0
        for begin, end in self._menu_spans:
            yield from self._pieces[last:begin]
            yield "\n\n"
            last = end
        yield from self._pieces[last:]


def _hidden(attributes: Mapping[str, str]) -> bool:
    return "hidden" in attributes and attributes["hidden"] != "until-found"
