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
_ISO_2022 = re.compile(rb"\x1b\$[()]?[@ABC]")  # begins characters of two bytes, all of them ASCII
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
_MOST_MET = frozenset(("Windows-1252", "ISO-8859-1"))
_AS_SURE = 1.15  # within it, the encoding that is met more often is the better guess
_LINE_ENDS = "\t\n\v\f\r"
_PUNCTUATION = " \n\r\u3000\u3001\u3002\uff0c"
_FEW = 0.01  # share of odd characters that a text may have, or of punctuation that it has at least


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
            if not _is_text(text):
                raise _binary(name)
            if "\ufffd" in text:
                _warn_of_replacements(text, codec.removesuffix("-sig"), name)
            return text
    guess = None
    if b"\0" in data or _ISO_2022.search(data):  # which may be valid UTF-8 by chance
        guess = _guess(_telling(data), name)
    if b"\0" in data:
        _require_wide(data[:_SAMPLE], guess, name)
    if b"\0" in data or (guess or "").startswith("ISO-2022"):
        return _decode_guessed(data, guess, name)
    try:
        return data.decode()
    except UnicodeDecodeError:
        pass
    if (damaged := _damaged_utf8(data, name)) is not None:
        return damaged
    if markup and (declared := _declared(data, name)) is not None:
        return declared
    # The detector would believe a declaration, which did not hold.
    undeclared = _CHARSET.sub(b"", data) if markup else data
    return _decode_guessed(data, _guess(_telling(undeclared), name), name)


def require_text(head: bytes, name: str) -> None:
    """Refuse binary files by their beginning.

    Raises:
        DocumentError: there are NUL bytes in it, and it is no UTF-16 or UTF-32 either.
    """
    if b"\0" in head and not any(head.startswith(mark) for mark, _ in _BOMS):
        _require_wide(head, _guess(head, name), name)


def _require_wide(data: bytes, guess: str | None, name: str) -> None:
    """Text in units of two or four bytes: numbers may look like it, but for its punctuation."""
    text = data.decode(guess, "replace") if guess else ""
    if not guess or sum(map(text.count, _PUNCTUATION)) < _FEW * len(text):
        raise _binary(name)


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
        if codec.startswith("utf"):  # it is not: that was tried, and the declaration was read
            return None
        text = data.decode(codec, "replace")
    except (LookupError, UnicodeError):
        return None
    if not _is_text(text):
        return None
    if "\ufffd" in text:
        _warn_of_replacements(text, codec, name)
    return text


def _guess(data: bytes, name: str) -> str | None:
    """The encoding that the detector takes it for; None for binary data."""
    try:
        import chardet
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} is not UTF-8, and its encoding is guessed by the package chardet; "
            'run: pip install "rapid-llm[documents]"'
        ) from error
    guesses = {guess["encoding"]: guess["confidence"] for guess in chardet.detect_all(data)}
    if None in guesses:
        return None
    era = chardet.EncodingEra
    met = era.MODERN_WEB | era.LEGACY_ISO | era.LEGACY_REGIONAL  # not DOS, old Macs, mainframes
    often = {guess["encoding"] for guess in chardet.detect_all(data, encoding_era=met)}

    def rank(name: str) -> tuple[bool, bool, float]:
        return name not in _MOST_MET, name not in often, -guesses[name]

    surest = max(guesses.values())
    return min((name for name in guesses if guesses[name] * _AS_SURE >= surest), key=rank)


def _decode_guessed(data: bytes, guess: str | None, name: str) -> str:
    if guess is None:
        raise _binary(name)
    text = data.decode(guess, "replace")
    if not _is_text(text):
        raise _binary(name)
    _warn(f"{name} is not UTF-8: it is read as {guess}, which is a guess; save it as UTF-8")
    return text


def _binary(name: str) -> DocumentError:
    return DocumentError(
        f"{name} is a binary file or in no known encoding: give a text, Markdown, HTML or PDF "
        "file, saved as UTF-8"
    )


def _telling(data: bytes) -> bytes:
    """What tells an encoding from others, as the detector looks at a beginning only."""
    if len(data) <= _SAMPLE or b"\0" in data:
        return data
    if match := _ISO_2022.search(data):
        return data[match.start() :][:_SAMPLE]
    lines = [line for line in data.splitlines(keepends=True) if not line.isascii()]
    return b"".join(lines)[:_SAMPLE]


def _is_text(text: str) -> bool:
    """Whether nearly all characters are some that a text has."""
    counts = Counter(text[:_SAMPLE])
    odd = sum(count for character, count in counts.items() if _is_odd(character))
    return odd <= max(1, _FEW * counts.total()) and "\0" not in text


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
