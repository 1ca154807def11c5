"""Reading documents: formats, encodings, and what is refused."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from rapid_llm.context import read_document
from rapid_llm.errors import DocumentError

PROSE = (
    "Es war einmal ein Müller, der hatte eine schöne Tochter. Er dachte: Käme ein ordentlicher "
    "Freier, so würde ich sie ihm geben. Nicht lange, so kam einer, der schien sehr reich zu sein."
)


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def pdf(*pages: str, password: str | None = None) -> bytes:
    """A PDF with one line of Helvetica a page; an empty string makes a page without text."""
    writer = PdfWriter()
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    for text in pages:
        page = writer.add_blank_page(width=300, height=200)
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
        )
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode() if text else b"")
        page[NameObject("/Contents")] = writer._add_object(stream)
    if password is not None:
        writer.encrypt(password, algorithm="RC4-128")
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def test_text_and_markdown_are_kept_as_they_are(tmp_path: Path) -> None:
    text = "# Title\n\n- a *point* <b>with tags</b>  \n\n\n\n```\n  code\n```\n"
    assert read_document(write(tmp_path / "a.md", text)) == text
    assert read_document(str(write(tmp_path / "a.txt", text))) == text


def test_a_markdown_file_that_starts_with_html_stays_markdown(tmp_path: Path) -> None:
    text = "<html>is how this page about HTML begins</html>\n"
    assert read_document(write(tmp_path / "page.md", text)) == text


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_become_newlines(tmp_path: Path, end: str) -> None:
    assert read_document(write(tmp_path / "a.txt", f"one{end}{end}two{end}")) == "one\n\ntwo\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    assert read_document(write(tmp_path / "a.txt", PROSE.encode(encoding))) == PROSE


def test_cyrillic_and_japanese_legacy_encodings(tmp_path: Path) -> None:
    russian = "Съешь же ещё этих мягких французских булок да выпей чаю. " * 3
    japanese = "これは日本語の文章です。漢字も仮名も含みます。" * 3
    assert read_document(write(tmp_path / "r.txt", russian.encode("cp1251"))) == russian
    assert read_document(write(tmp_path / "j.txt", japanese.encode("shift_jis"))) == japanese


HTML = """<!DOCTYPE html>
<html><head><title>The  Mill</title><style>p { color: red }</style>
<script>var hidden = 1;</script></head>
<body><!-- a comment --><h1>At the
river</h1><p>The mill   stood <b>by</b> the
river &amp; turned&nbsp;slowly.</p><ul><li>grain<li>flour</ul>
<table><tr><td>sack</td><td>12</td></tr><tr><td>loaf</td><td>3</td></tr></table>
<p>one<br>two</p><pre>def f():
    return 1</pre></body></html>"""


@pytest.mark.parametrize("name", ["page.html", "PAGE.HTM", "no-suffix"])
def test_html_becomes_readable_text(tmp_path: Path, name: str) -> None:
    text = read_document(write(tmp_path / name, HTML))
    assert text.startswith("The Mill\n\nAt the river\n\n")
    assert "The mill stood by the river & turned slowly." in text.replace("\xa0", " ")
    assert "\ngrain\nflour\n" in text
    assert "\nsack\t12\nloaf\t3\n" in text
    assert "one\ntwo" in text
    assert "def f():\n    return 1" in text
    assert not any(word in text for word in ("hidden", "color", "comment", "<", "\n\n\n"))


def test_html_charset_declaration_is_honoured(tmp_path: Path) -> None:
    page = '<html><head><meta charset="windows-1251"></head><body><p>Мельница</p></body></html>'
    assert read_document(write(tmp_path / "a.html", page.encode("cp1251"))) == "Мельница"


@pytest.mark.parametrize("name", ["a.pdf", "renamed.txt", "no-suffix"])
def test_pdf_text_page_after_page(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, pdf("The mill by the river.", "", "The end."))
    assert read_document(path) == "The mill by the river.\n\nThe end."


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße\r\n".encode())))
    assert read_document("-") == "Grüße\n"


def test_html_and_pdf_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (b"\n <HTML><body><p>The mill.</p></body></HTML>", pdf("The mill.")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert read_document("-") == "The mill."


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.md", b" \r\n\t\n", "holds no text"),
        ("empty.html", b"<html><script>x()</script></html>", "holds no text"),
        ("image.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), "binary"),
        ("image.html", b"<html>\0\0\0", "binary"),
        ("noise.txt", bytes(range(127, 256)) * 4, "binary"),
        ("broken.pdf", b"%PDF-1.7 and nothing that follows", "cannot be read as a PDF"),
        ("fake.pdf", b"no PDF at all", "cannot be read as a PDF"),
        ("scan.pdf", pdf("", ""), "without a text layer"),
        ("locked.pdf", pdf("The mill.", password="rye"), "cannot be read as a PDF"),
    ],
)
def test_what_holds_no_text_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, data: bytes, reason: str
) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(DocumentError) as caught:
        read_document(path)
    message = str(caught.value)
    assert str(path) in message
    assert reason in message
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"absent\.txt does not exist"):
        read_document(tmp_path / "absent.txt")
    with pytest.raises(DocumentError, match="cannot be read"):
        read_document(tmp_path)
    with pytest.raises(DocumentError, match="cannot be read"):
        read_document("a\0b")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all files")
def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "secret.txt", "text")
    path.chmod(0)
    with pytest.raises(DocumentError, match="Permission denied"):
        read_document(path)


def test_empty_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(DocumentError, match="standard input holds no text"):
        read_document("-")
