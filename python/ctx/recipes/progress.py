"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

__all__ = ["Progress"]


class Progress:
    """Counts up to `total`; `with Progress(...) as progress: progress.to(n, "text")`.

    Args:
        label: what is going on.
        total: where it ends.
        start: where it begins.
        lines: about how many lines the whole way is worth where there is no terminal.
    """

    def __init__(self, label: str, total: int, start: int = 0, lines: int = 20) -> None:
        self.label, self.total, self.done = label, total, start
        self.every = max(1, total // lines) if lines else total + 1
        self.bar: Any = None
        if not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            print("no progress bar: pip install tqdm", file=sys.stderr)
            return
        self.bar = tqdm(
            total=total, initial=start, desc=label, unit_scale=True, dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining} {postfix}",
        )  # fmt: skip

    def to(self, done: int, text: str = "") -> None:
        """Moves on to `done` of `total`."""
        before, self.done = self.done, done
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(done - before)
        elif done // self.every > before // self.every:
            print(f"{self.label} {done:,}/{self.total:,} {text}".rstrip(), file=sys.stderr)

    def advance(self, count: int) -> None:
        """Moves on by `count`."""
        self.to(self.done + count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
