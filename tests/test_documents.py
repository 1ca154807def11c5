"""Reading documents: formats, encodings, and what is refused."""

from __future__ import annotations

import io
import os
import sys
import warnings
from pathlib import Path

import pytest
from pdfs import LOCKED, pdf

from rapid_llm.context import read_document
from rapid_llm.errors import DocumentError, MissingDependencyError

PROSE = (
    "Es war einmal ein Müller, der hatte eine schöne Tochter. Er dachte: Käme ein ordentlicher "
    "Freier, so würde ich sie ihm geben. Nicht lange, so kam einer, der schien sehr reich zu sein."
)


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_what_says_its_encoding_is_read_without_a_word(tmp_path: Path, encoding: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_document(write(tmp_path / "a.txt", PROSE.encode(encoding))) == PROSE


RUSSIAN = "Съешь же ещё этих мягких французских булок да выпей чаю."
JAPANESE = "これは日本語の文章です。漢字も仮名も含みます。"


@pytest.mark.parametrize("ascii_lines", [0, 30_000])
@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (PROSE, "cp1252"),
        ("The price is 30 € for each of the tickets.", "cp1252"),
        ("Das Wort „Mühle“ steht im Wörterbuch – und sonst?", "cp1252"),
        ("Räksmörgås på ön åt älgen", "cp1252"),
        ("naïve café", "cp1252"),
        ("Zażółć gęślą jaźń. Wczoraj poszedłem do sklepu kupić chleb.", "cp1250"),
        ("Zażółć gęślą jaźń. Wczoraj poszedłem do sklepu kupić chleb.", "iso8859-2"),
        ("Zażółć gęślą jaźń. Wczoraj poszedłem do sklepu kupić chleb.", "cp852"),
        ("Příliš žluťoučký kůň úpěl ďábelské ódy.", "iso8859-2"),
        ("Die Mühle am Fluß wurde 1871 gebaut; schöne Grüße.", "cp850"),
        ("Die Mühle am Fluß wurde 1871 gebaut; schöne Grüße.", "mac_roman"),
        ("Le moulin près de la rivière était fermé. « Où ? » — l\u2019œuvre…", "mac_roman"),
        ("Die Gebühren für die Prüfung übernahm Größe & Söhne, Straße 5.", "mac_roman"),
        ("\u201cTomas Lind\u201d wrote the report \u2014 it cost £40.", "mac_roman"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "mac_cyrillic"),
        (RUSSIAN, "koi8-r"),
        ("Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.", "iso8859-7"),
        ("דג סקרן שט בים מאוכזב ולפתע מצא חברה.", "cp1255"),
        ("ذهبت أمس إلى السوق لشراء الخبز والحليب.", "cp1256"),
        ("เป็นมนุษย์สุดประเสริฐเลิศคุณค่า", "cp874"),
        (JAPANESE, "shift_jis"),
        ("テストA項目とCPU設定、東京Towerの高さ。これはテストBです。", "euc_jp"),
        (JAPANESE, "euc_jp"),
        (JAPANESE, "iso2022_jp"),
        ("这是一个中文文件。昨天下雨。大家都在家里看书喝茶。", "gb18030"),
        ("這是一個中文檔案。昨天下雨。大家都在家裡看書喝茶。", "big5"),
        ("이것은 한국어 문서입니다. 어제는 비가 왔습니다.", "euc_kr"),
    ],
)
def test_legacy_encodings_are_guessed_and_the_guess_is_said(
    tmp_path: Path, text: str, encoding: str, ascii_lines: int
) -> None:
    whole = "one more line\n" * ascii_lines + text
    with pytest.warns(UserWarning, match="legacy.txt is not UTF-8: it is read as .* a guess"):
        assert read_document(write(tmp_path / "legacy.txt", whole.encode(encoding))) == whole


@pytest.mark.parametrize(
    "text",
    [
        "naïve",
        "voilà l'été",
        "Größe: 5",
        "Straße",
        "señor González",
        "Åse på Ålesund",
        "¿Qué?",
        "20 °C outside",
        "5 £ or 10 €",
        "it\u2019s fine",
        "Dear François, the meeting is on Monday.",
    ],
)
def test_a_few_latin_letters_among_ascii_are_read_as_such(tmp_path: Path, text: str) -> None:
    with pytest.warns(UserWarning, match="a guess"):
        assert read_document(write(tmp_path / "a.txt", text.encode("cp1252"))) == text


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Привет, мир", "cp1251"),
        ("The word Привет is Russian", "cp1251"),
        ("Model X-5 и ещё", "cp1251"),
        ("Καλημέρα κόσμε", "cp1253"),
        ("İstanbul'da güneşli bir gün", "cp1254"),
        ("Łódź jest miastem w Polsce, a Kraków też.", "cp1250"),
        ("Čeština je jazyk", "cp1250"),
    ],
)
def test_a_few_words_of_another_script_or_language_stay_so(
    tmp_path: Path, text: str, encoding: str
) -> None:
    with pytest.warns(UserWarning, match="a guess"):
        assert read_document(write(tmp_path / "a.txt", text.encode(encoding))) == text


@pytest.mark.parametrize("text", [PROSE, RUSSIAN, JAPANESE, "昨天下雨。大家都在家里看书喝茶。" * 9])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_guessed_with_a_warning(
    tmp_path: Path, text: str, encoding: str
) -> None:
    text = f"{text}\n"
    with pytest.warns(UserWarning, match="a guess"):
        assert read_document(write(tmp_path / "a.txt", text.encode(encoding))) == text


def test_a_broken_byte_costs_its_place_and_not_the_encoding(tmp_path: Path) -> None:
    data = PROSE.encode() * 3 + b"\xff" + PROSE.encode() * 3
    with pytest.warns(UserWarning, match=r"a\.txt is not quite UTF-8: 1 places"):
        text = read_document(write(tmp_path / "a.txt", data))
    assert text == PROSE * 3 + "\ufffd" + PROSE * 3


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_marked_text_that_is_cut_off_is_read_up_to_there(tmp_path: Path, encoding: str) -> None:
    data = "Grüße aus Köln an die Müllerin, viele Grüße, schöne Grüße ä".encode(encoding)[:-1]
    with pytest.warns(UserWarning, match="not quite UTF"):
        text = read_document(write(tmp_path / "a.txt", data))
    assert text.startswith("Grüße aus Köln")
    assert text.endswith("\ufffd")


def test_what_is_not_read_is_refused_before_it_is_loaded(
    tmp_path: Path,
) -> None:
    path = tmp_path / "large.docx"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(50 * 2**30)  # sparse
    with pytest.raises(DocumentError, match="a Word document: save it as PDF"):
        read_document(path)
    with path.open("r+b") as file:
        file.write(b"\0\0\0\0")
    with pytest.raises(DocumentError, match="binary"):
        read_document(path.rename(tmp_path / "zeros"))


@pytest.mark.parametrize(
    ("name", "data", "package"),
    [
        ("a.html", b"<html><p>The mill.", "lxml"),
        ("a.pdf", pdf("The mill."), "pypdfium2"),
        ("a.txt", "Die Mühle am Fluß".encode("cp1252"), "chardet"),
    ],
)
def test_a_missing_reader_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError) as caught:
        read_document(write(tmp_path / name, data))
    message = str(caught.value)
    assert package in message
    assert 'pip install "rapid-llm[documents]"' in message
    assert "\n" not in message


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüße\r\n".encode())))
    assert read_document("-") == "Grüße\n"


def test_html_and_pdf_are_recognized_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (b"\n <HTML><body><p>The mill.</p></body></HTML>", pdf("The mill.")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert read_document("-") == "The mill."


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.md", b" \r\n\t\n", "holds no text"),
        ("empty.html", b"<html><script>x()</script></html>", "holds no text"),
        ("image.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)), "a PNG image"),
        ("image.html", b"<html>\0\0\0", "binary"),
        ("noise.txt", bytes(range(127, 256)) * 4, "binary"),
        ("broken.pdf", b"%PDF-1.7 and nothing that follows", "cannot be read as a PDF"),
        ("fake.pdf", b"no PDF at all", "cannot be read as a PDF"),
        ("scan.pdf", pdf("", ""), "without a text layer"),
        ("locked.pdf", LOCKED, "asks for a password"),
        ("letter.docx", b"PK\x03\x04" + bytes(100), "a Word document"),
        ("letter.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a Word document"),
        ("sheet.XLSX", b"PK\x03\x04" + bytes(100), "an Excel workbook"),
        ("all.zip", b"PK\x03\x04" + bytes(100), "a ZIP archive: unpack it"),
        ("photo.txt", b"\xff\xd8\xff\xe0 JFIF", "a JPEG image"),
        ("song", b"ID3\x04", "an MP3 recording"),
        ("letter.rtf", rb"{\rtf1\ansi The mill.}", "an RTF document"),
        ("marked.txt", b"\xff\xfe" + bytes(range(1, 256, 2)) * 40, "binary"),
        ("numbers.txt", b"".join(n.to_bytes(2, "little") for n in range(200)), "binary"),
        ("nul.txt", b"The mill.\0The river" * 9, "binary"),
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
