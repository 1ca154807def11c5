"""Recognise unsupported file formats by their first bytes."""

from __future__ import annotations

from pathlib import PurePath

HEAD_BYTES = 8192  # first bytes of a file, checked before the rest is loaded

_AS_PDF_OR_TEXT = "save it as PDF, HTML or text first"
_UNPACK = "unpack it, and give the files in it"
_NOT_TEXT = "give a text, Markdown, HTML or PDF file"

# By suffix, because these formats share a container (ZIP, OLE).
_ZIPPED = {
    **dict.fromkeys((".docx", ".docm", ".dotx"), "a Word document"),
    **dict.fromkeys((".xlsx", ".xlsm", ".xltx"), "an Excel workbook"),
    **dict.fromkeys((".pptx", ".pptm", ".ppsx"), "a PowerPoint presentation"),
    **dict.fromkeys((".odt", ".ods", ".odp", ".odg"), "an OpenDocument file"),
    **dict.fromkeys((".pages", ".numbers", ".key"), "an iWork document"),
    ".epub": "an EPUB book",
}
_OLE = {
    **dict.fromkeys((".doc", ".dot"), "a Word document"),
    ".xls": "an Excel workbook",
    ".ppt": "a PowerPoint presentation",
    ".msg": "an Outlook message",
}
_DOCUMENTS = (
    (b"{\\rtf", "an RTF document"),
    (b"%!PS", "a PostScript file"),
    (b"AT&TFORM", "a DjVu document"),
    (b"ITSF", "a compiled HTML help file"),
)
_ARCHIVES = (
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
)
_IMAGES = (
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF87a", "a GIF image"),
    (b"GIF89a", "a GIF image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
)
_OTHERS = (
    (b"ID3", "an MP3 recording"),
    (b"\xff\xfb", "an MP3 recording"),
    (b"fLaC", "a FLAC recording"),
    (b"OggS", "an Ogg recording"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"PAR1", "a Parquet table"),
    (b"\x7fELF", "a program"),
    (b"MZ\x90\0", "a program"),
)
_RIFF = {b"WEBP": "a WebP image", b"WAVE": "a WAV recording", b"AVI ": "an AVI video"}


def why_unread(head: bytes, suffix: str) -> str | None:
    """Description of an unsupported file with a remedy; None if the file may be readable.

    Args:
        head: first ``HEAD_BYTES`` of the file.
        suffix: suffix of its name, such as ``.docx``; may be empty.
    """
    suffix = PurePath(f"x{suffix}").suffix.lower()
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        document = _ZIPPED.get(suffix)
        return f"{document}: {_AS_PDF_OR_TEXT}" if document else f"a ZIP archive: {_UNPACK}"
    if head.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):
        return f"{_OLE.get(suffix, 'a Microsoft Office file')}: {_AS_PDF_OR_TEXT}"
    if head[257:262] == b"ustar":
        return f"a tar archive: {_UNPACK}"
    if head[:4] == b"RIFF" and (kind := _RIFF.get(head[8:12])):
        return f"{kind}: {_NOT_TEXT}"
    if head[4:8] == b"ftyp":
        heif = head[8:12] in (b"heic", b"heix", b"avif", b"mif1")
        return f"{'a HEIF image' if heif else 'an MP4 recording'}: {_NOT_TEXT}"
    for signatures, remedy in (
        (_DOCUMENTS, _AS_PDF_OR_TEXT),
        (_ARCHIVES, _UNPACK),
        (_IMAGES, "run OCR on it first, and give the text"),
        (_OTHERS, _NOT_TEXT),
    ):
        for signature, kind in signatures:
            if head.startswith(signature):
                return f"{kind}: {remedy}"
    return None
