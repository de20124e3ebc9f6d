"""The documents of this repository, and the code blocks in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    text: str
    line: int  # of its first line of code, from 1


def documents():
    """README.md and the site's pages, but those that the site's build makes."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    made = (ROOT / "docs" / "tutorials", ROOT / "docs" / "_")
    return [ROOT / "README.md", *(p for p in pages if not str(p).startswith(tuple(map(str, made))))]


def names(files):
    """Their paths below the repository, for the names of tests."""
    return [path.relative_to(ROOT).as_posix() for path in files]


def blocks_of(text, *languages):
    """The blocks of these languages, in their order."""
    return [
        Block(found[2], re.sub(rf"^{found[1]}", "", found[3], flags=re.M),
              text.count("\n", 0, found.start(3)) + 1)
        for found in BLOCK.finditer(text)
        if found[2] in languages
    ]  # fmt: skip
