"""Read the documents named on a command line: files, folders, patterns, standard input."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from rapid_llm.console import show
from rapid_llm.errors import DocumentError

T = TypeVar("T")

_NAMED = 5  # files that a note names; it counts the others
_NOTHING = ": give text, Markdown, HTML or PDF files, or a folder with some"


def read_documents(names: Sequence[str]) -> dict[str, str]:
    """Read documents and return their texts by name, in this order and without blank ones.

    A folder stands for all files in it, a pattern (``*``, ``?``, ``[…]``, ``**``) for all that
    match, in both cases sorted and without hidden ones. Files among these that cannot be read are
    skipped with a note.

    Args:
        names: files, folders, patterns; ``-`` for standard input.

    Raises:
        DocumentError: a named file cannot be read, a folder cannot be listed, or there is no text
            in a folder, in what matches a pattern, or in all documents.
        MissingDependencyError: the package that reads a document's format is not installed.
    """
    texts: dict[str, str] = {}
    failed: dict[str, DocumentError] = {}  # errors of files in folders and patterns
    read: set[str] = set()  # normalised paths, because one file may be named twice
    for name in names:
        if not _stands_for_files(name):
            if os.path.normpath(name) not in read:
                texts[name] = _read(name, may_be_blank=len(names) > 1)
                read.add(os.path.normpath(name))
            continue
        files = list(dict.fromkeys(_files(name)))
        found: dict[str, str] = {}
        for each in files:
            if os.path.normpath(each) not in read:
                _try(each, found, failed)
        if not any(map(str.strip, found.values())) and read.isdisjoint(
            map(os.path.normpath, files)
        ):
            reason = next((f"; {failed[each]}" for each in files if each in failed), "")
            raise DocumentError(f"{name} holds no text that can be read{reason or _NOTHING}")
        texts |= found
        read |= set(map(os.path.normpath, found))
    blank = [name for name, text in texts.items() if not text.strip()]
    if len(blank) == len(texts):
        raise DocumentError(f"{', '.join(texts)} hold no text: give a file that is not empty")
    _note(blank, failed)
    return {name: text for name, text in texts.items() if text.strip()}


def _try(name: str, found: dict[str, str], failed: dict[str, DocumentError]) -> None:
    """Read a file and add its text to ``found``, or its error to ``failed``."""
    try:
        found[name] = _read(name, may_be_blank=True)
    except DocumentError as error:
        failed[name] = error


def _note(blank: Sequence[str], failed: Mapping[str, DocumentError]) -> None:
    """Print which files were skipped: unknown formats in one line, others with their errors."""
    from rapid_llm.context.documents import SUFFIXES

    unknown = [name for name in failed if Path(name).suffix.lower() not in SUFFIXES]
    for name, error in failed.items():
        if name not in unknown:  # a document that the user probably wants
            show(f"Warning: {error}; it is passed over", stderr=True)
    if blank:
        holds = "hold no text and are" if len(blank) > 1 else "holds no text and is"
        show(f"{_listed(blank)} {holds} passed over", stderr=True)
    if unknown:
        are = "are" if len(unknown) > 1 else "is"
        show(f"{_listed(unknown)} {are} passed over: not a format that is read", stderr=True)


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
    """Paths of regular files; pipes and devices may never end."""
    return filter(os.path.isfile, paths)


def _parts(path: str) -> tuple[str, ...]:
    return Path(path).parts


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
