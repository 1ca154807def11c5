"""Decode bytes as text: by byte order mark, as UTF-8, by declaration, or by detection."""

from __future__ import annotations

import codecs
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping

import regex

from rapid_llm.errors import DocumentError, MissingDependencyError

# UTF-32 before UTF-16, whose little-endian mark is a prefix of UTF-32's.
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ISO_2022 = re.compile(rb"\x1b\$[()]?[@ABC]")  # switches to characters of two ASCII bytes
_CHARSET = re.compile(
    rb"<meta[^>]{1,512}?charset\s{0,8}=\s{0,8}[\"']?\s{0,8}([\w.:-]{1,40})"
    rb"|<\?xml[^>]{1,256}?encoding\s{0,8}=\s{0,8}[\"']([\w.:-]{1,40})",
    re.IGNORECASE,
)
_DECLARED_WITHIN = 4096  # first bytes searched for a declared encoding; HTML requires 1024
# Encodings that in practice name a superset (WHATWG's Encoding Standard).
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
# Labels of pages that Python does not know, beside those with a prefix or suffix.
_LABELS = {
    **dict.fromkeys(("logical", "visual", "csiso88598e", "csiso88598i"), "iso8859-8"),
    **dict.fromkeys(("koi", "koi8", "cskoi8r"), "koi8-r"),
    "koi8-ru": "koi8-u",
    "big5-hkscs": "big5hkscs",
    "cn-big5": "big5",
    **dict.fromkeys(("csksc56011987", "cseuckr"), "cp949"),
    "cseucpkdfmtjapanese": "euc_jp",
    "x-mac-roman": "mac_roman",
    "x-mac-ukrainian": "mac_cyrillic",
}
_SAMPLE = 200_000  # bytes passed to the detector
_MOST_COMMON = frozenset(("Windows-1252", "ISO-8859-1"))
_CLOSE = 1.15  # ratio of confidences within which the more common encoding is preferred
_UNSURE = 0.2  # highest confidence that says little: of a few words in any encoding
_CLOSE_IF_UNSURE = 1.7
_NOISE = 0.07  # highest confidence in noise
_NOISY, _ODD = 0.03, 8  # misfits of noise, for a byte beyond ASCII and in all, are more than that
_LIKELY = 4  # ratio of confidences within which words tell which it is
_MOSTLY = 0.8  # minimum share of ASCII in a text of Latin letters
_WORDS_WITHIN = 20_000  # bytes whose words are compared
# Letters of other alphabets than Latin; Chinese, Japanese and Korean words stand beside Latin ones.
_OTHER = r"[\p{L}--[\p{Latin}\p{Han}\p{Hiragana}\u30a0-\u30ff\p{Bopomofo}\p{Hangul}]]"
# What no word holds, in the order of the lines: a symbol between letters (but for apostrophes,
# dashes and the like), a capital after a small letter, letters of two alphabets side by side, an
# accent on no letter, Korean within a Latin word, and controls of ISO-8859 or undecodable bytes.
_MISFIT = regex.compile(
    r"(?<=[\p{Ll}\p{Lu}])[^\p{L}\p{M}\p{Z}\p{Cf}\x00-\x9f\u00b4\u00b7\u2010-\u2019\u2026](?=\p{Ll})"
    r"|(?<=\p{Ll})[\p{Lu}--[A-Z]]"
    rf"|(?<=[A-Za-z]){_OTHER}|{_OTHER}(?=[A-Za-z])"
    r"|(?<=\p{L})[\u2500-\u259f]|[\u2500-\u259f](?=\p{L})"
    r"|(?<![\p{L}\p{M}])\p{Mn}|(?<=[a-z])\p{Hangul}+(?=[a-z])"
    r"|[\x80-\x9f\ufffd]",
    flags=regex.VERSION1,
)
_LINE_ENDS = "\t\n\v\f\r"
_PUNCTUATION = " \n\r\u3000\u3001\u3002\uff0c"
_FEW = 0.01  # maximum share of odd characters in a text, and minimum share of punctuation


def decode(data: bytes, name: str, *, markup: bool = False) -> str:
    """Decode bytes as text.

    A byte order mark decides; else UTF-8 if the data is valid but for a few broken bytes; else the
    encoding that an HTML page declares; else the detector's guess. A warning says what was guessed
    or replaced.

    Args:
        data: bytes of a file.
        name: name of the file in warnings and errors.
        markup: whether the data is HTML, which may declare its encoding.

    Raises:
        DocumentError: the data is not text, or its encoding is unknown.
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
    if b"\0" in data or _ISO_2022.search(data):  # may be valid UTF-8 by chance
        guess = _guess(_informative(data), name)
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
    # Hide the declaration, which was wrong, from the detector, which would believe it.
    undeclared = _CHARSET.sub(b"", data) if markup else data
    return _decode_guessed(data, _guess(_informative(undeclared), name), name)


def require_text(head: bytes, name: str) -> None:
    """Refuse a binary file by its first bytes.

    Args:
        head: first bytes of the file.
        name: name of the file in errors.

    Raises:
        DocumentError: there are NUL bytes, and the data is not UTF-16 or UTF-32.
    """
    if b"\0" in head and not any(head.startswith(mark) for mark, _ in _BOMS):
        _require_wide(head, _guess(head, name), name)


def _require_wide(data: bytes, guess: str | None, name: str) -> None:
    """Refuse data that is not UTF-16 or UTF-32; binary numbers can look like it, but for spaces."""
    text = data.decode(guess, "replace") if guess else ""
    if not guess or not _is_punctuated(text):
        raise _binary(name)


def _damaged_utf8(data: bytes, name: str) -> str | None:
    """Decode UTF-8 with a few broken bytes; None if the data is in another encoding."""
    text = data.decode(errors="replace")
    broken = text.count("\ufffd")
    beyond_ascii = len(text) - len(text.encode("ascii", "ignore"))
    # Text in another encoding rarely has valid UTF-8 sequences by chance.
    if beyond_ascii < 10 * broken:
        return None
    _warn_of_replacements(text, "utf-8", name)
    return text


def _declared(data: bytes, name: str) -> str | None:
    match = _CHARSET.search(data, 0, _DECLARED_WITHIN)
    if match is None:
        return None
    try:
        codec = _codec((match[1] or match[2]).decode().lower())
        codec = _SUPERSETS.get(codec, codec)
        if codec.startswith("utf"):  # wrong: UTF-8 was tried, and UTF-16 would hide the declaration
            return None
        text = data.decode(codec, "replace")
    except (LookupError, UnicodeError):
        return None
    if not _is_text(text):
        return None
    if "\ufffd" in text:
        _warn_of_replacements(text, codec, name)
    return text


def _codec(label: str) -> str:
    """Python's name of an encoding that a page may call otherwise (WHATWG's Encoding Standard)."""
    label = _LABELS.get(label, label)
    plain = re.sub(r"^(?:x-)+|^(?:windows|dos)-(?=\d)|(?<=8859-[68])-[ei]$", "", label)
    try:
        return codecs.lookup(label).name
    except LookupError:
        return codecs.lookup(f"cp{plain}" if plain.isdigit() else plain).name


def _guess(data: bytes, name: str) -> str | None:
    """Encoding that the detector guesses; None for binary data."""
    try:
        import chardet
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} is not UTF-8, and its encoding is guessed by the package chardet; "
            'run: pip install "rapid-llm[documents]"'
        ) from error
    guesses = {guess["encoding"]: guess["confidence"] for guess in chardet.detect_all(data)}
    if None in guesses:
        return _utf16(data)
    era = chardet.EncodingEra
    # Not those of DOS, old Macs and mainframes.
    eras = era.MODERN_WEB | era.LEGACY_ISO | era.LEGACY_REGIONAL
    common = {guess["encoding"] for guess in chardet.detect_all(data, encoding_era=eras)}

    def rank(name: str) -> tuple[bool, bool, float]:
        return name not in _MOST_COMMON, name not in common, -guesses[name]

    close = _CLOSE
    best = max(guesses.values())
    unsure = best < _UNSURE
    words = data[:_WORDS_WITHIN]
    misfits, beyond = _misfits(guesses, words), sum(byte > 127 for byte in words)
    if best < _NOISE and _fewest(misfits, guesses, _CLOSE_IF_UNSURE) > max(_NOISY * beyond, _ODD):
        return None
    most = _fewest(misfits, guesses, _LIKELY) + _FEW * beyond
    guesses = {name: guesses[name] for name in guesses if misfits[name] <= most}
    if unsure and _MOSTLY * len(data) <= sum(byte < 128 for byte in data):
        # A few letters among ASCII: of rare encodings, one or another always fits by chance.
        web = {guess["encoding"] for guess in chardet.detect_all(data, encoding_era=era.MODERN_WEB)}
        guesses = {name: guesses[name] for name in guesses if name in web} or guesses
        close = _CLOSE_IF_UNSURE
    best = max(guesses.values())
    return min((name for name in guesses if guesses[name] * close >= best), key=rank)


def _utf16(data: bytes) -> str | None:
    """Byte order of UTF-16 whose characters have few NUL bytes, as of Chinese; None for others."""
    for codec in ("utf-16-le", "utf-16-be"):
        text = data.decode(codec, "replace")
        if _is_text(text) and _is_punctuated(text):
            return codec
    return None


def _misfits(guesses: Iterable[str], data: bytes) -> dict[str, int]:
    """How often, by each of the guesses, a word looks like none."""
    return {
        # A text in UTF-8 may be cut within a character.
        name: len(_MISFIT.findall(data.decode(name, "ignore" if name == "utf-8" else "replace")))
        for name in guesses
    }


def _fewest(misfits: Mapping[str, int], guesses: Mapping[str, float], ratio: float) -> int:
    """Fewest misfits by a guess whose confidence is within a ratio of the highest."""
    likely = max(guesses.values()) / ratio
    return min(misfits[name] for name in guesses if guesses[name] >= likely)


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


def _informative(data: bytes) -> bytes:
    """Sample with the bytes that identify an encoding, as the detector reads a prefix only."""
    if len(data) <= _SAMPLE or b"\0" in data:
        return data
    if match := _ISO_2022.search(data):
        return data[match.start() :][:_SAMPLE]
    lines = [line for line in data.splitlines(keepends=True) if not line.isascii()]
    return b"".join(lines)[:_SAMPLE]


def _is_text(text: str) -> bool:
    """Whether nearly all characters are printable or white space."""
    counts = Counter(text[:_SAMPLE])
    odd = sum(count for character, count in counts.items() if _is_odd(character))
    return odd <= max(1, _FEW * counts.total()) and "\0" not in text


def _is_punctuated(text: str) -> bool:
    return sum(map(text.count, _PUNCTUATION)) >= _FEW * len(text)


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
