"""Read the text layer of a PDF with PDFium in a separate process."""

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
    r"""Text of a PDF: its pages, joined by form feeds (``\f``).

    Hyphenated words are joined, running headers and footers are kept once, and dot leaders become
    one ellipsis. A page that cannot be read is blank.

    Args:
        file: open file with a ``fileno``.
        name: name of the file in warnings and errors.

    Raises:
        DocumentError: the file is damaged, encrypted, too large, takes too long or has no text.
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
    """Text of each page from PDFium; None for a page that it cannot read."""
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
        pages.append(None)  # PDFium crashed on this page
        if len(pages) == total:
            return pages


class _Found(NamedTuple):
    """Output of the PDFium process.

    Attributes:
        head: first line of the output; None if there is none.
        pages: texts of the pages that it read; None for a page that it could not.
        timed_out: whether it was stopped at the time limit.
    """

    head: dict[str, Any] | None
    pages: list[str | None]
    timed_out: bool


def _run(file: IO[bytes], first: int, seconds: float) -> _Found:
    # The same module path as here, so that nothing is imported from the current folder.
    program = (
        f"import sys; sys.path = {sys.path!r}; import runpy; "
        f"runpy.run_path({str(_WORKER)!r}, run_name='__main__')"
    )
    os.lseek(file.fileno(), 0, os.SEEK_SET)  # the process reads from this position
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
    # Drop a last line without a line end: the process did not finish it.
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
