"""The documents that a command line names: files, folders, patterns, standard input."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rapid_llm.console import show
from rapid_llm.errors import DocumentError

T = TypeVar("T")

_NAMED = 5  # files that a note names; it counts the others


def read_documents(names: Sequence[str]) -> dict[str, str]:
    """Read documents and return their texts by name, in this order and without blank ones.

    A folder stands for all files in it, a pattern (``*``, ``?``, ``[…]``, ``**``) for all that
    match, in both cases sorted and without hidden ones. Of these, files that cannot be read are
    passed over, with a note.

    Args:
        names: files, folders, patterns; ``-`` for standard input.

    Raises:
        DocumentError: a named file cannot be read, a folder cannot be listed, or there is no text
            in a folder, in what matches a pattern, or in all documents.
        MissingDependencyError: the package that reads a document's format is not installed.
    """
    texts: dict[str, str] = {}
    unknown: list[str] = []
    seen: set[str] = set()  # a file counts once, however it is named

    def is_new(name: str) -> bool:
        known = os.path.normpath(name) in seen
        seen.add(os.path.normpath(name))
        return not known

    for name in names:
        if not _stands_for_files(name):
            if is_new(name):
                texts[name] = _read(name, may_be_blank=len(names) > 1)
            continue
        files = list(_files(name))
        new = list(filter(is_new, files))
        read = {each: _read_if_readable(each, unknown) for each in new}
        found = {each: text for each, text in read.items() if text is not None}
        if len(new) == len(files) and not any(map(str.strip, found.values())):
            held = f"{len(files):,} tried" if files else "no file in it"
            raise DocumentError(
                f"{name} holds no text that can be read ({held}): give text, Markdown, HTML or "
                "PDF files, or a folder with some"
            )
        texts |= found
    blank = [name for name, text in texts.items() if not text.strip()]
    if len(blank) == len(texts):
        raise DocumentError(f"{', '.join(texts)} hold no text: give a file that is not empty")
    if blank:
        show(f"{_listed(blank)} {'hold' if blank[1:] else 'holds'} no text and "
             f"{'are' if blank[1:] else 'is'} passed over", stderr=True)  # fmt: skip
    if unknown:
        show(f"{_listed(unknown)} {'are' if unknown[1:] else 'is'} passed over: not a format that "
             "is read", stderr=True)  # fmt: skip
    return {name: text for name, text in texts.items() if text.strip()}


def warned(read: Callable[[], T]) -> T:
    """Run a reader, and show its warnings on standard error."""
    with warnings.catch_warnings(record=True) as guessed:
        warnings.simplefilter("always")
        result = read()
    for warning in guessed:
        show(f"Warning: {warning.message}", stderr=True)
    return result


def _read(name: str, *, may_be_blank: bool) -> str:
    from rapid_llm.context.documents import read_document

    return warned(lambda: read_document(name, may_be_blank=may_be_blank))


def _read_if_readable(name: str, unknown: list[str]) -> str | None:
    """The text of a file; None, and its name in ``unknown``, if its format is not read.

    A file whose suffix promises text would be missed: the reason why it cannot be read is shown.
    """
    from rapid_llm.context.documents import SUFFIXES

    try:
        return _read(name, may_be_blank=True)
    except DocumentError as error:
        if Path(name).suffix.lower() in SUFFIXES:
            show(f"Warning: {error}; it is passed over", stderr=True)
        else:
            unknown.append(name)
        return None


def _stands_for_files(name: str) -> bool:
    return os.path.isdir(name) or (glob.has_magic(name) and not os.path.lexists(name))


def _files(name: str) -> Iterator[str]:
    """Regular files in a folder, or that match a pattern; sorted, without hidden ones."""
    if os.path.isdir(name):
        yield from _in_folder(name)
        return
    matches = sorted(glob.glob(name, recursive=True), key=_parts)
    if not matches:
        raise DocumentError(f"no file matches {name}: check the pattern")
    for match in matches:
        yield from _in_folder(match) if os.path.isdir(match) else _regular([match])


def _in_folder(folder: str) -> list[str]:
    def refuse(error: OSError) -> None:
        raise DocumentError(
            f"folder {error.filename} cannot be listed ({error.strerror}): repair its permissions, "
            "or name the files"
        )

    found: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [each for each in folders if not each.startswith(".")]
        found += [os.path.join(parent, each) for each in files if not each.startswith(".")]
    return sorted(_regular(found), key=_parts)


def _regular(paths: Iterable[str]) -> Iterator[str]:
    """Without pipes and devices, which may never end, and dangling links."""
    return filter(os.path.isfile, paths)


def _parts(path: str) -> tuple[str, ...]:
    return Path(path).parts


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
