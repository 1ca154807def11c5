"""Code blocks, links and headings of Markdown documents."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHEELS = sorted(file.parent for file in ROOT.glob("integrations/*/README.md"))
"""Folders of the wheels; none in an unpacked sdist."""

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(wheel / "README.md" for wheel in WHEELS),
    *sorted((ROOT / "docs").rglob("*.md")),
]

_FENCE = re.compile(
    r"(?:^[ ]*<!-- compiled only: (?P<reason>[^>]+?) -->\n+)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?)(?: +\{#([\w-]+)\})?$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        language: ``python`` or ``bash``.
        code: its lines.
        line: number of its first line of code in the document.
        compiled_only: why it is not run, from the comment ``<!-- compiled only: why -->`` before
            it; None for a block that is run.
    """

    language: str
    code: str
    line: int
    compiled_only: str | None


def blocks(document: Path) -> list[Block]:
    """The Python and shell blocks of a document."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(
            found["language"],
            "".join(line.removeprefix(found["indent"]) for line in found["code"].splitlines(True)),
            text.count("\n", 0, found.start("code")) + 1,
            found["reason"],
        )
        for found in _FENCE.finditer(text)
        if found["language"] in ("python", "bash")
    ]


def commands(code: str) -> Iterator[list[str]]:
    """The words of each ``rapid-llm`` command in a shell script, without redirections."""
    for line in code.replace("\\\n", " ").splitlines():
        for part in re.split(r"[|;&]+ ", line):
            part = re.sub(r"(?:^|\s)#.*$", "", re.sub(r"\d?[<>]+ *\S+", "", part))
            if "rapid-llm " in part and part.lstrip().startswith("rapid-llm "):
                yield shlex.split(part)


def links(document: Path) -> list[str]:
    """Targets of the links and pictures outside code."""
    return _LINK.findall(_without_code(document))


def anchors(document: Path) -> set[str]:
    """Anchors of the headings, as mkdocs and GitHub make them."""
    return {
        given or re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title, given in _HEADING.findall(_without_code(document))
    }


def _without_code(document: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
