"""PDFs: their pages, the text that printing broke, and what cannot be read."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
from pdfs import OPEN, pdf

from rapid_llm.context import read_document
from rapid_llm.context.reading import pdf as reader
from rapid_llm.context.reading.pdf_layout import flowing_text
from rapid_llm.errors import DocumentError


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def pages(tmp_path: Path, *contents: str | list[str] | bytes) -> list[str]:
    return read_document(write(tmp_path / "a.pdf", pdf(*contents))).split("\f")


@pytest.mark.parametrize("name", ["a.pdf", "renamed.txt", "no-suffix"])
def test_a_pdf_is_read_page_after_page_whatever_its_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, pdf("The mill by the river.", "Its wheel.", "The end."))
    assert read_document(path) == "The mill by the river.\fIts wheel.\fThe end."


def test_a_password_for_printing_does_not_keep_from_reading(tmp_path: Path) -> None:
    assert read_document(write(tmp_path / "a.pdf", OPEN)) == "The tower opens in May."


def test_words_that_a_line_end_divides_are_whole(tmp_path: Path) -> None:
    (text,) = pages(tmp_path, ["The manip-", "ulation of a well-", "known wheel, well-known here."])
    assert "The manipulation of a well-known wheel" in " ".join(text.split())


def test_a_word_that_a_page_end_divides_is_whole_on_the_first(tmp_path: Path) -> None:
    first, second = pages(tmp_path, "It is the manip-", "ulation, of a wheel.")
    assert first == "It is the manipulation,"
    assert second == "of a wheel."


def test_running_headers_and_page_numbers_are_not_repeated(tmp_path: Path) -> None:
    names = ["alder", "birch", "cedar", "dogwood", "elm", "fir"]
    text = pages(
        tmp_path,
        *[
            ["The Tree Book", f"All about the {name}.", "The end.", f"- {n} -"]
            for n, name in enumerate(names, 7)
        ],
    )
    assert [page.split("\n")[-2:] for page in text[:1]] == [["All about the alder.", "The end."]]
    assert text[0].startswith("The Tree Book\n")
    for page, name in zip(text[1:], names[1:], strict=True):
        assert page.startswith(f"All about the {name}.")
        assert "- " not in page


def test_left_and_right_pages_have_running_lines_of_their_own(tmp_path: Path) -> None:
    text = pages(
        tmp_path,
        *[
            [f"{n} MILLS" if n % 2 else f"RIVERS {n}", f"What page {'abcdefgh'[n]} says."]
            for n in range(8)
        ],
    )
    assert [page.count("MILLS") + page.count("RIVERS") for page in text] == [1, 1] + [0] * 6
    assert all(
        f"What page {letter} says." in page for page, letter in zip(text, "abcdefgh", strict=True)
    )


def test_numbers_that_do_not_count_the_pages_stay(tmp_path: Path) -> None:
    rows = ["12 30 7", "11 29 44", "19 2 3", "40 41 5"]
    assert pages(tmp_path, *rows) == rows


def test_a_line_on_pages_far_apart_stays(tmp_path: Path) -> None:
    contents = [f"Page {letter}" for letter in "abcdefghijkl"]
    contents[1] = contents[5] = contents[9] = "return 0;"
    assert pages(tmp_path, *contents) == contents


def test_leaders_of_a_table_of_contents_are_one_ellipsis(tmp_path: Path) -> None:
    (text,) = pages(
        tmp_path, ["The mill . . . . . . . . . . 12", "The river............ 31", "e.g. ..."]
    )
    assert text == "The mill … 12\nThe river … 31\ne.g. ..."


def test_a_page_without_text_is_blank_and_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"a\.pdf: page 2 gave no text"):
        assert pages(tmp_path, "one", "", "three") == ["one", "", "three"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pages(tmp_path, "one", "two") == ["one", "two"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is limited on Linux")
def test_a_page_that_takes_pdfium_down_costs_that_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_PDF_MEMORY", 400 * 2**20)
    with pytest.warns(UserWarning, match=r"a\.pdf: page 2 cannot be read"):
        found = pages(tmp_path, "one", b"0 0 m 1 1 l S " * 3_000_000, "three")
    assert found == ["one", "", "three"]


def test_a_pdf_that_takes_too_long_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_PDF_SECONDS", 0.0)
    with pytest.raises(DocumentError, match=r"a\.pdf is given up: after 0 s PDFium was still at"):
        pages(tmp_path, "one")
    monkeypatch.undo()
    assert pages(tmp_path, "one") == ["one"]


def test_a_pdf_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_PDF_BYTES", 300)
    with pytest.raises(DocumentError, match=r"no more than .* are read: split it"):
        pages(tmp_path, "one")


# Each took minutes by a search from every character on, or by a copy of the line for each number.
@pytest.mark.parametrize(
    "page", ["a" * 1_000_000, "1 " * 500_000 + "1", "a-" * 500_000 + "a", "." + " . x" * 250_000]
)
def test_long_pages_of_any_shape_are_read_in_time(page: str) -> None:
    assert flowing_text([page] * 3) == [page] * 3
