"""Text as bytes: where it is read, what is held out, and how a batch of streams walks through
it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ctx.recipes.errors import RecipeError

__all__ = ["Corpus", "Streams", "load_corpus", "read_text", "standard_library", "unigram_entropy"]

# Not a source of its own: tests, installed packages, and tables written by programs.
_SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "site-packages",
    "test",
    "tests",
}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training text and the held-out text that follows it, uint8 each."""

    training: Tensor
    held_out: Tensor
    digest: str  # SHA-256 of both: a resumed run must read what the interrupted one read


def standard_library() -> list[Path]:
    """The sources of Python's own standard library, in one order on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in root.rglob("*.py") if not _SKIPPED & set(p.relative_to(root).parts)]
    if not paths:
        raise RecipeError(f"no sources of the standard library in {root}: name the FILES to read")
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def read_text(path: Path) -> bytes:
    """The bytes of one UTF-8 text file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror or error}") from None
    if not data:
        raise RecipeError(f"{path} must be a text file, got an empty one")
    try:
        data.decode("utf-8")
        where = data.find(b"\0")  # valid UTF-8, yet no text has one
    except UnicodeDecodeError as error:
        where = error.start
    if where >= 0:
        raise RecipeError(f"{path} must be UTF-8 text, got byte 0x{data[where]:02x} at {where:,}")
    return data


def load_corpus(files: Sequence[Path], held_out: int) -> Corpus:
    """Reads the files in order, the standard library's where there are none.

    Held out is the end of the text: the last whole files that reach `held_out` bytes (at most a
    tenth of the text), or exactly the last bytes where whole files would take twice as much.
    """
    texts = [read_text(path) for path in files] or _standard_texts()
    texts = [text if text.endswith(b"\n") else text + b"\n" for text in texts]
    total = sum(map(len, texts))
    wanted = max(1, min(held_out, total // 10))
    kept = 0
    for text in reversed(texts):
        if kept >= wanted:
            break
        kept += len(text)
    kept = kept if kept <= 2 * wanted else wanted
    joined = b"".join(texts)
    whole = torch.frombuffer(bytearray(joined), dtype=torch.uint8)
    digest = hashlib.sha256(joined).hexdigest()
    return Corpus(whole[: total - kept], whole[total - kept :], f"{digest}-{kept}")


def _standard_texts() -> list[bytes]:
    texts = []
    for path in standard_library():
        try:
            texts.append(read_text(path))
        except RecipeError:  # empty packages, and the few files that are not UTF-8 by intent
            continue
    return texts


class Streams:
    """`rows` contiguous streams through one text, all read at the same pace.

    Args:
        text: uint8 [N]; row i reads the i-th of `rows` equal parts.
        rows: streams side by side.
        length: tokens per row and call.
    """

    def __init__(self, text: Tensor, rows: int, length: int) -> None:
        size = len(text) // rows
        self.length = length
        self.chunks = (size - 1) // length  # the last chunk still needs a next token to predict
        if self.chunks < 1:
            raise RecipeError(
                f"the text must have at least {rows * (length + 1):,} bytes, that is "
                f"{rows} rows of {length} + 1, got {len(text):,}"
            )
        self.rows = text[: rows * size].view(rows, size)

    def chunk(self, index: int) -> tuple[Tensor, Tensor]:
        """Tokens and the tokens that follow them, int64 [rows, length] each; wraps around."""
        start = index % self.chunks * self.length
        both = self.rows[:, start : start + self.length + 1].long()
        return both[:, :-1], both[:, 1:]

    def starts(self, index: int) -> bool:
        """Whether chunk `index` begins the rows anew, so that no memory may be carried to it."""
        return index % self.chunks == 0


def unigram_entropy(text: Tensor) -> float:
    """Bits per byte of the best model that ignores all context."""
    counts = torch.bincount(text.long(), minlength=256).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum() / math.log(2))
