"""HTML pages: what is read of them, and how it is laid out."""

from __future__ import annotations

from pathlib import Path

import pytest

from rapid_llm.context import read_document
from rapid_llm.context.reading.html import html_text


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


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


@pytest.mark.parametrize(
    ("encoding", "declared", "text"),
    [
        ("cp1252", "iso-8859-1", "“a” – 30 €"),
        ("gb18030", "gb2312", "漢字测试"),
        ("cp932", "Shift_JIS", "①漢字"),
        ("koi8-r", "koi8-r", "Мельница"),
        ("cp932", "x-sjis", "水車"),
        ("cp1251", "X-CP1251", "Мельница"),
        ("cp874", "windows-874", "โรงสี"),
        ("iso8859-8", "iso-8859-8-i", "הטחנה"),
        ("cp949", "csEUCKR", "방앗간"),
    ],
)
def test_declared_encodings_are_what_browsers_take_them_for(
    tmp_path: Path, encoding: str, declared: str, text: str
) -> None:
    page = f'<html><meta http-equiv=x content="text/html; charset={declared}"><p>{text}'
    assert read_document(write(tmp_path / "a.html", page.encode(encoding))) == text


@pytest.mark.parametrize("declared", ["utf-8", "utf-16", "hex", "nonsense"])
def test_a_declaration_that_does_not_hold_is_passed_over(tmp_path: Path, declared: str) -> None:
    page = f"<html><meta charset={declared}><p>Die schöne Müllerin fährt über die Brücke."
    with pytest.warns(UserWarning, match="a guess"):
        text = read_document(write(tmp_path / "a.html", page.encode("cp1252")))
    assert text == "Die schöne Müllerin fährt über die Brücke."


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("a<b>b</b> <i> c</i>d<br><br><br>e", "ab cd\n\ne"),
        ("<p>one<p>two", "one\n\ntwo"),
        ("<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>", "a\nb\nc"),
        ("<dl><dt>term<dd>what it is</dl>", "term\nwhat it is"),
        ("<a href=x>the link's text</a> and <img alt=no src=x>more", "the link's text and more"),
        ("<table><tr><td><p>a</p><td><td><p>b<tr><td>c</table>", "a\t\tb\nc"),
        (
            "<table><caption>C</caption><thead><tr><th>h<th>i</thead><tbody><tr><td>1<td>2</table>",
            "C\nh\ti\n1\t2",
        ),
        ("<pre>\n  if x:\n\n    y  </pre>z", "  if x:\n\n    y\n\nz"),
        ("&lt;p&gt; &amp;amp; &eacute; &#x41;&#8364;&nbsp;x", "<p> &amp; é A€ x"),
        ("Fahr&shy;rad", "Fahrrad"),
        ("<p hidden>no</p><input hidden>yes", "yes"),
        ("<dialog>no</dialog><dialog open>yes</dialog>", "yes"),
        ("<p style='color: red; DISPLAY : none'>no<p style='visibility:hidden'>no<p>yes", "yes"),
        ("<body style='display:none'>yes<p style='display:none-such'>so", "yes\n\nso"),
        (
            "<center>Mills</center>by the river<listing>old</listing>",
            "Mills\n\nby the river\n\nold",
        ),
        (
            "<a>Home<svg></svg></a><a>Mills<img src=x></a><button>Search</button>Name<input>Age",
            "Home Mills Search Name Age",
        ),
        ("<svg><text>no</text></svg><template>no</template><noscript>no</noscript>yes", "yes"),
        ("<svg><g><title>no</title><p>yes", "yes"),
        ("<script src=x /><p>yes", "yes"),
        ("<script>if (a<b) {'</p>'}</script>yes<style>no", "yes"),
        ("yes<!-- no", "yes"),
        ("<p>1</p></body></html><p>2</p>", "1\n\n2"),
        ("<nav><a>Home</a><a>About</a></nav><p>The mill by the river.", "The mill by the river."),
        ("<nav>All that there is in it</nav><p>x", "All that there is in it\n\nx"),
        (
            "<nav><ul><li>Home</ul><main><p>The menu was not closed.",
            "Home\n\nThe menu was not closed.",
        ),
    ],
)
def test_a_page_reads_as_a_browser_shows_it(page: str, text: str) -> None:
    assert html_text(page) == text


# Each took minutes, or more memory than there was, by trees, by recursion or by backtracking.
@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>x</p>\n" * 200_000, "\n\n".join("x" * 200_000)),
        ("<div>" * 300_000 + "x", "x"),
        ("<div>" * 200_000 + "x" + "</div>" * 200_000, "x"),
        ("<b>x<p>" * 100_000, "\n\n".join("x" * 100_000)),
        ("<ul><li>x" * 100_000, "\n".join("x" * 100_000)),
        ("<table>" + "<tr><td>x</td><td>y</td></tr>" * 50_000, "\n".join(["x\ty"] * 50_000)),
        ("x<!-- -->" * 200_000, "x" * 200_000),
        ("<!--" * 500_000, ""),
        ("<a " * 500_000, ""),
        ("<pre>" + " " * 2_000_000 + "x", " " * 2_000_000 + "x"),
        ("<pre>" + "\n " * 1_000_000 + "x", " x"),
        ("<p " + " ".join(f"a{n}=1" for n in range(200_000)) + ">x", "x"),
        (f"<p title='{'v' * 2_000_000}'>x", "x"),
        ("<svg>" * 300_000 + "<p>x", "x"),
    ],
)
def test_pages_of_two_megabytes_of_any_shape_are_read_in_time(page: str, text: str) -> None:
    assert html_text(page) == text
