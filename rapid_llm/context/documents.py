"""Reading a document from disk (or standard input) into plain text."""

from __future__ import annotations

import codecs
import logging
import re
import sys
from io import BytesIO
from pathlib import Path

from bs4 import BeautifulSoup
from bs4.builder import HTMLTreeBuilder
from bs4.element import NavigableString
from charset_normalizer import from_bytes
from pypdf import PdfReader

from rapid_llm.errors import DocumentError

_HTML_SUFFIXES = {".html", ".htm", ".xhtml"}
_TEXT_SUFFIXES = {".txt", ".md", ".markdown"}
_HTML_START = re.compile(rb"\s*(<\?xml[^>]*>\s*)?<(!doctype\s+html|html)\b", re.IGNORECASE)
_BOMS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UNREAD_TAGS = ["script", "style", "template", "noscript", "svg"]
_BLOCK_TAGS = [*(HTMLTreeBuilder.DEFAULT_BLOCK_ELEMENTS - {"li"}), "summary", "title"]
_LINE_TAGS = ["br", "li", "tr", "caption", "option"]

_LOADABLE = "give a text, Markdown, HTML or PDF file"


def read_document(path: str | Path, *, may_be_blank: bool = False) -> str:
    r"""The text of a file, with ``\n`` line ends.

    Markdown and other text is kept as it is; HTML loses its tags, scripts and styles; a PDF gives
    its text layer, page after page. HTML and PDF are known by their suffix or their first bytes.

    Args:
        path: a text, Markdown, HTML or PDF file; ``-`` reads standard input.
        may_be_blank: take a file that is empty or holds white space alone (a PDF without text
            may hold scanned pages: it is refused in any case).

    Raises:
        DocumentError: the file is missing, unreadable, binary or holds no text.
    """
    name = "standard input" if str(path) == "-" else str(path)
    data = _read_bytes(path, name)
    suffix = Path(path).suffix.lower()
    is_text = suffix in _TEXT_SUFFIXES
    if data.startswith(b"%PDF-") or suffix == ".pdf":
        text = _pdf_text(data, name)
    elif suffix in _HTML_SUFFIXES or (not is_text and _HTML_START.match(data)):
        text = _html_text(data, name)
    else:
        text = _decode(data, name)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip() and not may_be_blank:
        raise DocumentError(f"{name} holds no text: {_LOADABLE} that is not empty")
    return text


def _read_bytes(path: str | Path, name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
    except FileNotFoundError:
        raise DocumentError(f"{name} does not exist: check the path, or give - for stdin") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DocumentError(f"{name} cannot be read ({reason}): {_LOADABLE}") from error


def _require_text(data: bytes, name: str) -> None:
    """Only UTF-16 and UTF-32 text holds NUL bytes, and it starts with a byte order mark."""
    if b"\0" in data and not data.startswith(_BOMS):
        raise DocumentError(f"{name} is a binary file, not text: {_LOADABLE}")


def _decode(data: bytes, name: str) -> str:
    _require_text(data, name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        match = from_bytes(data).best()
    if match is None:
        raise DocumentError(f"{name} is a binary file or in no known encoding: save it as UTF-8")
    return str(match)


def _html_text(data: bytes, name: str) -> str:
    _require_text(data, name)
    soup = BeautifulSoup(data, "html.parser")  # honours a byte order mark and <meta charset>
    for tag in soup(_UNREAD_TAGS):
        tag.decompose()
    # A browser shows runs of white space as one space, except inside <pre>.
    for string in soup.find_all(string=True):
        if type(string) is NavigableString and not string.find_parent("pre"):
            string.replace_with(re.sub(r"\s+", " ", string))
    for tag in soup(_BLOCK_TAGS):
        tag.insert_before("\n\n")
        tag.insert_after("\n\n")
    for tag in soup(_LINE_TAGS):
        tag.insert_before("\n")
    for tag in soup(["td", "th"]):
        tag.insert_after("\t")
    text = re.sub(r"[ \t]+\n", "\n", soup.get_text())
    text = re.sub(r"\n (?! )", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _pdf_text(data: bytes, name: str) -> str:
    # pypdf reports every repaired flaw of a file as a warning on stderr.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        pages = [page.extract_text() for page in PdfReader(BytesIO(data)).pages]
    except Exception as error:  # pypdf raises many types on damaged and on encrypted files
        raise DocumentError(
            f"{name} cannot be read as a PDF ({error}): give an undamaged, unencrypted file"
        ) from error
    text = "\n\n".join(page.strip() for page in pages if page.strip())
    if not text:
        raise DocumentError(
            f"{name} is a PDF without a text layer (a scan?): run OCR on it first, e.g. ocrmypdf"
        )
    # Damaged fonts can yield lone surrogates, which no tokenizer takes.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
