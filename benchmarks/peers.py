"""What one would use instead: torch's attention and other people's packages, at equal sizes.

A peer whose package is not installed is named with the command that installs it, and left out.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import _peer_attention, _peer_compressive, _peer_transformers
from benchmarks._harness import arguments, start
from benchmarks._report import Report, bars

__all__ = ["main"]

# Name on the command line: (the peer's module here, the package that it needs).
PEERS: dict[str, tuple[Any, str | None]] = {
    "attention": (_peer_attention, None),
    "compressive": (_peer_compressive, "compressive_transformer_pytorch"),
    "transformers": (_peer_transformers, "transformers"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("benchmarks.peers", str(__doc__).splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=PEERS, default=list(PEERS), help="these peers; default all"
    )
    args = start(parser, argv)
    report = Report("peers", args)
    for name in args.only:
        peer, package = PEERS[name]
        if package and importlib.util.find_spec(package) is None:
            report.note(f"{peer.TITLE}: not installed, not measured; {peer.INSTALL}")
        else:
            peer.measure(report)
    return report.finish(_draw)


def _draw(figure: Any, report: Report) -> None:
    whats = list(dict.fromkeys((row["peer"], row["what"]) for row in report.rows))
    if not whats:
        return
    columns = 3
    lines = -(-len(whats) // columns)
    figure.set_size_inches(15, 2.2 * lines + 0.6)
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (peer, what) in zip(grid, whats, strict=False):
        rows = [row for row in report.rows if (row["peer"], row["what"]) == (peer, what)]
        names = [row["who"].removeprefix(f"{peer}, ") for row in rows]
        bars(axes, names, [1e3 * row["time"].median for row in rows], "ms")
        axes.set_title(f"{peer}: {what}", fontsize=8)
    for axes in grid[len(whats) :]:  # what is left of the last line
        axes.set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
