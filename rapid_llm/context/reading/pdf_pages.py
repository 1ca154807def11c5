"""Program that writes the text of each page of a PDF on standard input, as lines of JSON.

It runs in a separate process, so that a page that takes too much time or memory, or crashes PDFium,
does not harm the reader, and because PDFium is not thread-safe.

The first line is ``{"pages": n}``, or ``{"error": PDFium's code, "message": …}``; then one string
per page, null for a page that cannot be read.
"""

from __future__ import annotations

import json
import sys

import pypdfium2


def _limit_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most == resource.RLIM_INFINITY or limit < most:
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def _write(value: object) -> None:
    print(json.dumps(value), flush=True)


def _page_text(document: pypdfium2.PdfDocument, number: int) -> str | None:
    try:
        page = document[number]
        try:
            textpage = page.get_textpage()
            try:
                text: str = textpage.get_text_bounded()
            finally:
                textpage.close()
        finally:
            page.close()
    except pypdfium2.PdfiumError:
        return None
    return text


def main(first: int, memory: int) -> None:
    """Write the pages from index ``first`` on, within ``memory`` bytes of address space."""
    _limit_memory(memory)
    try:
        document = pypdfium2.PdfDocument(sys.stdin.buffer.read())
    except pypdfium2.PdfiumError as error:
        _write({"error": error.err_code, "message": str(error)})
        return
    _write({"pages": len(document)})
    for number in range(first, len(document)):
        _write(_page_text(document, number))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
