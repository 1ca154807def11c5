"""From bytes to text: a declared encoding, UTF-8, or the best guess, which is said."""

from __future__ import annotations

import codecs
import re
import unicodedata
import warnings
from collections import Counter

from rapid_llm.errors import DocumentError, MissingDependencyError

# UTF-32's first: its mark begins with UTF-16's.
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ISO_2022 = re.compile(rb"\x1b(\$[@ABC)]|\([BIJ]|\$\([CDQ])")  # switches the set of characters
_CHARSET = re.compile(
    rb"<meta[^>]{1,512}?charset\s{0,8}=\s{0,8}[\"']?\s{0,8}([\w.:-]{1,40})"
    rb"|<\?xml[^>]{1,256}?encoding\s{0,8}=\s{0,8}[\"']([\w.:-]{1,40})",
    re.IGNORECASE,
)
_DECLARED_WITHIN = 4096  # bytes of a page that may declare its encoding; HTML asks for 1024
# Names under which more is written than they stand for (WHATWG's Encoding Standard).
_SUPERSETS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
_SAMPLE = 200_000  # bytes that a guess is made from
_LINE_ENDS = "\t\n\v\f\r"
_FEW = 0.01  # share of odd characters or bytes that a text may have


def decode(data: bytes, name: str, *, markup: bool = False) -> str:
    """The text that the bytes stand for.

    A byte order mark decides; then UTF-8 is read if it is valid, but for a stray byte in a hundred
    characters; then what an HTML page declares; then the detector's guess. What is guessed or
    replaced is said in a warning.

    Args:
        data: the bytes.
        name: what warnings and errors call them.
        markup: they are HTML, which may declare its encoding.

    Raises:
        DocumentError: they are no text, or of no known encoding.
        MissingDependencyError: the encoding has to be guessed, and chardet is not installed.
    """
    for mark, codec in _BOMS:
        if data.startswith(mark):
            text = data.decode(codec, "replace")
            if "\ufffd" in text:
                _warn_of_replacements(text, codec.removesuffix("-sig"), name)
            return text
    if b"\0" in data:
        require_text(data, name)
        codec = _unmarked_utf16(data)
        _warn(f"{name} does not say its encoding: it is read as {codec.upper()}, which is a guess")
        return data.decode(codec, "replace")
    if not _ISO_2022.search(data):
        try:
            return data.decode()
        except UnicodeDecodeError:
            pass
        if (damaged := _damaged_utf8(data, name)) is not None:
            return damaged
    if markup and (declared := _declared(data, name)) is not None:
        return declared
    return _guessed(data, name)


def require_text(head: bytes, name: str) -> None:
    """Refuse binary files by their beginning.

    Raises:
        DocumentError: there are NUL bytes in it, and it is no UTF-16 or UTF-32 either.
    """
    if b"\0" not in head or any(head.startswith(mark) for mark, _ in _BOMS):
        return
    if not _is_text(head.decode(_unmarked_utf16(head), "replace")):
        raise DocumentError(
            f"{name} is a binary file, not text: give a text, Markdown, HTML or PDF file"
        )


def _unmarked_utf16(data: bytes) -> str:
    """Latin letters, blanks and line ends have a NUL in UTF-16, on one side of each."""
    on_the_right = data[1::2].count(0) >= data[0::2].count(0)
    return "utf-16-le" if on_the_right else "utf-16-be"


def _damaged_utf8(data: bytes, name: str) -> str | None:
    """UTF-8 in which a few bytes are broken; None if it is another encoding."""
    text = data.decode(errors="replace")
    broken = text.count("\ufffd")
    beyond_ascii = len(text) - len(text.encode("ascii", "ignore"))
    # Another encoding's bytes are hardly ever valid UTF-8 by chance.
    if beyond_ascii < 10 * broken:
        return None
    _warn_of_replacements(text, "utf-8", name)
    return text


def _declared(data: bytes, name: str) -> str | None:
    match = _CHARSET.search(data, 0, _DECLARED_WITHIN)
    if match is None:
        return None
    try:
        codec = codecs.lookup((match[1] or match[2]).decode()).name
        codec = _SUPERSETS.get(codec, codec)
        text = data.decode(codec, "replace")
    except (LookupError, UnicodeError):
        return None
    if not _is_text(text):
        return None
    if "\ufffd" in text:
        _warn_of_replacements(text, codec, name)
    return text


def _guessed(data: bytes, name: str) -> str:
    try:
        import chardet
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} is not UTF-8, and its encoding is guessed by the package chardet; "
            'run: pip install "rapid-llm[documents]"'
        ) from error
    guess = chardet.detect(_telling(data))["encoding"]
    try:
        text = data.decode(guess or "ascii", "replace")
    except LookupError:
        text = "\0"
    if not _is_text(text):
        raise DocumentError(
            f"{name} is a binary file or in no known encoding: save it as UTF-8 text"
        )
    _warn(f"{name} is not UTF-8: it is read as {guess}, which is a guess; save it as UTF-8")
    return text


def _telling(data: bytes) -> bytes:
    """The lines that tell an encoding from others, as the detector looks at a beginning only."""
    if len(data) <= _SAMPLE or _ISO_2022.search(data):
        return data
    lines = [line for line in data.splitlines(keepends=True) if not line.isascii()]
    return b"".join(lines)[:_SAMPLE]


def _is_text(text: str) -> bool:
    """Whether nearly all characters are some that a text has."""
    counts = Counter(text[:_SAMPLE])
    odd = sum(count for character, count in counts.items() if _is_odd(character))
    return odd <= _FEW * counts.total() and "\0" not in text


def _is_odd(character: str) -> bool:
    if character in _LINE_ENDS:
        return False
    return character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs")


def _warn_of_replacements(text: str, codec: str, name: str) -> None:
    _warn(
        f"{name} is not quite {codec.upper()}: {text.count(chr(0xFFFD)):,} places that cannot be "
        "read became U+FFFD"
    )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
