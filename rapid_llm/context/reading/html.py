"""Convert an HTML page to text, laid out as in a browser, in one pass over parser events.

No tree is built, so the time is linear in the size of the page, however its elements are nested.
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
    "address", "article", "aside", "blockquote", "body", "center", "details", "dialog", "dir",
    "div", "dl", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5",
    "h6", "header", "hgroup", "hr", "legend", "listing", "main", "menu", "nav", "ol", "p",
    "plaintext", "pre", "search", "section", "summary", "table", "title", "ul", "xmp",
))
_LINES = frozenset(("caption", "dd", "dt", "li", "option", "optgroup", "tr"))
# Boxes within a line: the words before, in and after one are apart, without any white space.
_BOXES = frozenset((
    "audio", "button", "canvas", "embed", "iframe", "img", "input", "marquee", "meter", "object",
    "progress", "select", "svg", "textarea", "video",
))
# fmt: on
_LISTS = frozenset(("dir", "dl", "menu", "ol", "ul"))
_CELLS = frozenset(("td", "th"))
_KEPT_BLANKS = frozenset(("pre", "textarea", "xmp", "listing"))

# Tags that end an unclosed <svg>, as in browsers.
_NOT_IN_SVG = _BLOCKS - {"title"}

_BLANKS = re.compile(r"\s+")
_HIDDEN_BY_STYLE = re.compile(
    r"(?:^|;)\s{0,8}(?:display\s{0,8}:\s{0,8}none|visibility\s{0,8}:\s{0,8}(?:hidden|collapse))(?![\w-])",
    re.IGNORECASE,
)


def html_text(page: str) -> str:
    r"""Convert a page to text.

    Blocks are separated by blank lines; list items, table rows and ``<br>`` begin lines; cells are
    separated by tabs; ``<pre>`` is not changed. Scripts, styles and hidden elements are left out,
    and so are menus (``<nav>``), unless they are most of the page.

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
    """Writes text from the parser's events.

    White space is written together with the text after it, so that a break replaces the blanks
    around it.
    """

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._breaks = 0  # newlines to write before the next text
        self._tabs = 0  # tabs to write before it, if there are no breaks
        self._blank = False  # whether to write a space before it, if there are no tabs either
        self._unread: list[str] = []  # open elements from one that is left out
        self._verbatim = 0  # number of open elements that keep their white space
        self._begins_verbatim = False
        self._items = 0  # number of open list items
        self._begins_cell = False  # whether nothing was written in this cell yet
        self._menus: list[int] = []  # index of the first piece of each open menu
        self._menu_spans: list[tuple[int, int]] = []

    # --- parser events ------------------------------------------------------------------------

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        if self._unread[:1] == ["svg"] and tag in _NOT_IN_SVG:
            self._unread.clear()  # the <svg> was not closed
        if self._unread or _hidden(tag, attributes):
            self._unread.append(tag)
            return
        self._blank |= tag in _BOXES
        if tag in _UNREAD:
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
        self._blank |= tag in _BOXES
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


def _hidden(tag: str, attributes: Mapping[str, str]) -> bool:
    if tag == "dialog" and "open" not in attributes:
        return True
    # Pages hide all of themselves until their scripts have run.
    style = attributes.get("style", "") if tag not in ("html", "body") else ""
    if style and _HIDDEN_BY_STYLE.search(style):
        return True
    return "hidden" in attributes and attributes["hidden"] != "until-found"
