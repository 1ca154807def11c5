"""The text layer of a PDF, read by PDFium in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import IO, Any, NamedTuple

from rapid_llm.context.reading.pdf_layout import flowing_text
from rapid_llm.errors import DocumentError, MissingDependencyError

MAX_PDF_BYTES = 512 * 2**20
MAX_PDF_SECONDS = 60.0
MAX_PDF_MEMORY = 4 * 2**30  # bytes of address space
PAGE_BREAK = "\f"

_WORKER = Path(__file__).with_name("pdf_pages.py")
_PASSWORD_NEEDED = 4  # FPDF_ERR_PASSWORD
_TO_BE_TRIED = "give an undamaged file, or one printed to PDF anew"


def pdf_text(file: IO[bytes], name: str) -> str:
    r"""The text of a PDF: its pages, joined by form feeds (``\f``) so that each stays known.

    Words that a line end divides are whole again; running headers and footers are kept once, and
    the dots that lead to a page number are one ellipsis. A page that cannot be read is blank.

    Args:
        file: an open file of the system's, which has a ``fileno``.
        name: what warnings and errors call it.

    Raises:
        DocumentError: it is damaged, encrypted, too large, takes too long or holds no text.
        MissingDependencyError: pypdfium2 is not installed.
    """
    try:
        import pypdfium2  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            'PDF is read by the package pypdfium2; run: pip install "rapid-llm[documents]"'
        ) from error
    size = file.seek(0, 2)
    if size > MAX_PDF_BYTES:
        raise DocumentError(
            f"{name} is a PDF of {size / 2**20:,.0f} MiB, and no more than "
            f"{MAX_PDF_BYTES / 2**20:,.0f} MiB are read: split it"
        )
    pages = _pages(file, name)
    if not any(page and page.strip() for page in pages):
        raise DocumentError(
            f"{name} is a PDF without a text layer (a scan?): run OCR on it first, e.g. ocrmypdf"
        )
    _warn_of_blank(pages, name)
    return PAGE_BREAK.join(flowing_text([page or "" for page in pages]))


def _pages(file: IO[bytes], name: str) -> list[str | None]:
    """The text of each page as PDFium gives it; None for a page that it cannot read."""
    deadline = monotonic() + MAX_PDF_SECONDS
    pages: list[str | None] = []
    while True:
        found = _run(file, len(pages), deadline - monotonic())
        if found.head is None:
            if found.timed_out:
                raise _too_slow(name, f"page {len(pages) + 1}" if pages else "opening it")
            raise DocumentError(f"{name} cannot be read as a PDF (PDFium fails): {_TO_BE_TRIED}")
        if "error" in found.head:
            raise _unopened(found.head, name)
        pages += found.pages
        total: int = found.head["pages"]
        if len(pages) >= total:
            return pages
        if found.timed_out:
            raise _too_slow(name, f"page {len(pages) + 1} of {total}")
        pages.append(None)  # PDFium went down on it
        if len(pages) == total:
            return pages


class _Found(NamedTuple):
    """What the process wrote.

    Attributes:
        head: its first line; None if it did not come so far.
        pages: those that it read.
        timed_out: it was stopped.
    """

    head: dict[str, Any] | None
    pages: list[str | None]
    timed_out: bool


def _run(file: IO[bytes], first: int, seconds: float) -> _Found:
    # It finds the packages that this process finds, and nothing in the current folder.
    program = (
        f"import sys; sys.path = {sys.path!r}; import runpy; "
        f"runpy.run_path({str(_WORKER)!r}, run_name='__main__')"
    )
    os.lseek(file.fileno(), 0, os.SEEK_SET)  # where the process begins to read
    try:
        written = subprocess.run(
            [sys.executable, "-c", program, str(first), str(MAX_PDF_MEMORY)],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=max(seconds, 0),
            check=False,
        ).stdout
        timed_out = False
    except subprocess.TimeoutExpired as stopped:
        written, timed_out = stopped.stdout or b"", True
    # A line without an end is one that the process did not finish.
    lines = [json.loads(line) for line in written.split(b"\n")[:-1]]
    return _Found(lines[0] if lines else None, lines[1:], timed_out)


def _too_slow(name: str, at: str) -> DocumentError:
    return DocumentError(
        f"{name} is given up: after {MAX_PDF_SECONDS:g} s PDFium was still at {at}; "
        f"{_TO_BE_TRIED}, or split it"
    )


def _unopened(head: dict[str, Any], name: str) -> DocumentError:
    if head["error"] == _PASSWORD_NEEDED:
        return DocumentError(
            f"{name} cannot be read as a PDF, as it asks for a password: give a copy without one"
        )
    return DocumentError(f"{name} cannot be read as a PDF ({head['message']}): {_TO_BE_TRIED}")


def _warn_of_blank(pages: Sequence[str | None], name: str) -> None:
    unread = [number for number, page in enumerate(pages, 1) if page is None]
    blank = [
        number for number, page in enumerate(pages, 1) if page is not None and not page.strip()
    ]
    if unread:
        warnings.warn(f"{name}: {_listed(unread)} cannot be read, and is left out", stacklevel=4)
    if blank:
        warnings.warn(
            f"{name}: {_listed(blank)} gave no text (blank, scanned or damaged), and is left out",
            stacklevel=4,
        )


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")
    return f"page {shown}" if len(numbers) == 1 else f"each of the {len(numbers)} pages {shown}"
