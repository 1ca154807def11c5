"""Read a document from disk or standard input as plain text."""

from __future__ import annotations

import re
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from rapid_llm.context.reading.encodings import decode, require_text
from rapid_llm.context.reading.formats import HEAD_BYTES, why_unread
from rapid_llm.context.reading.html import html_text
from rapid_llm.context.reading.pdf import pdf_text
from rapid_llm.errors import DocumentError

_HTML_SUFFIXES = {".html", ".htm", ".xhtml"}
_TEXT_SUFFIXES = {".txt", ".md", ".markdown"}
SUFFIXES = frozenset({*_HTML_SUFFIXES, *_TEXT_SUFFIXES, ".pdf"})
"""Suffixes of formats that are read; other files are read if they hold text."""

_HTML_START = re.compile(rb"\s*(<\?xml[^>]*>\s*)?<(!doctype\s+html|html)\b", re.IGNORECASE)

_LOADABLE = "give a text, Markdown, HTML or PDF file"


def read_document(path: str | Path, *, may_be_blank: bool = False) -> str:
    r"""Read a file as text with ``\n`` line ends.

    Markdown and other text is not changed. HTML loses tags, scripts, styles and menus. A PDF gives
    its text layer with a form feed (``\f``) between pages, so that the character at ``position`` is
    on page ``1 + text.count("\f", 0, position)``. HTML and PDF are recognised by suffix or first
    bytes. A warning says what was guessed or left out.

    Args:
        path: text, Markdown, HTML or PDF file; ``-`` for standard input.
        may_be_blank: whether to accept a file that is empty or all white space. A PDF without text
            may be scanned, and is refused in any case.

    Raises:
        DocumentError: the file is missing, unreadable, in an unsupported format, or has no text.
        MissingDependencyError: the package that reads its format is not installed.
    """
    name = "standard input" if str(path) == "-" else str(path)
    suffix = Path(path).suffix.lower()
    with _opened(path, name) as file:
        head = _read(file, name, HEAD_BYTES)
        if reason := why_unread(head, suffix):
            raise DocumentError(f"{name} is {reason}")
        if head.startswith(b"%PDF-") or suffix == ".pdf":
            text = _pdf(head, file, name)
        else:
            text = _text(head, file, name, suffix)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip() and not may_be_blank:
        raise DocumentError(f"{name} holds no text: {_LOADABLE} that is not empty")
    return text


def _opened(path: str | Path, name: str) -> AbstractContextManager[IO[bytes]]:
    if str(path) == "-":
        return nullcontext(sys.stdin.buffer)
    try:
        return Path(path).open("rb")
    except FileNotFoundError:
        raise DocumentError(f"{name} does not exist: check the path, or give - for stdin") from None
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error


def _read(file: IO[bytes], name: str, size: int = -1) -> bytes:
    try:
        return file.read(size)
    except OSError as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: OSError | ValueError) -> DocumentError:
    reason = getattr(error, "strerror", None) or error
    return DocumentError(f"{name} cannot be read ({reason}): {_LOADABLE}")


def _text(head: bytes, file: IO[bytes], name: str, suffix: str) -> str:
    require_text(head, name)  # refuse binary files before the rest is loaded
    looks_like_html = suffix not in _TEXT_SUFFIXES and _HTML_START.match(head) is not None
    is_html = suffix in _HTML_SUFFIXES or looks_like_html
    text = decode(head + _read(file, name), name, markup=is_html)
    return html_text(text) if is_html else text


def _pdf(head: bytes, file: IO[bytes], name: str) -> str:
    if file is not sys.stdin.buffer and file.seekable():
        return pdf_text(file, name)
    with TemporaryFile() as copy:  # a pipe can be read once, but PDFium restarts after a bad page
        copy.write(head)
        while piece := _read(file, name, 2**20):
            copy.write(piece)
        return pdf_text(copy, name)
