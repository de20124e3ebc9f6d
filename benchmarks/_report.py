"""A benchmark's result: a table, ratios with their bounds, JSON and a picture."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._harness import Timing
from benchmarks._machine import describe, machine
from ctx.hf.evaluation.statistics import Estimate

__all__ = ["Ratio", "Report", "duration", "table"]


@dataclass(frozen=True)
class Ratio:
    """One claim: what was measured, and on which side of the bound it should be."""

    item: str
    what: str
    measured: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def line(self) -> str:
        sign, verdict = ("≥" if self.at_least else "≤"), ("met" if self.met else "MISSED")
        return f"[{self.item}] {self.what}: {self.measured:.3g} ({sign} {self.bound:g}) {verdict}"


@dataclass
class Report:
    """Collects rows and ratios, then says and writes them.

    A row is a dict of plain values; its columns are the keys, in order of appearance. Seconds come
    as a `Timing` under a key of their own and are written as median, spread and samples; means of
    an evaluation come as `Estimate`, or None, and are written as value and error.
    """

    name: str
    args: argparse.Namespace
    rows: list[dict[str, Any]] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)  # series for the picture

    def __post_init__(self) -> None:
        self.machine = machine()
        print(describe(self.machine), flush=True)

    def row(self, **columns: Any) -> None:
        self.rows.append(columns)
        print(".", end="", flush=True)  # of progress

    def at_least(self, item: str, what: str, measured: float, bound: float) -> None:
        self.ratios.append(Ratio(item, what, measured, bound, at_least=True))

    def at_most(self, item: str, what: str, measured: float, bound: float) -> None:
        self.ratios.append(Ratio(item, what, measured, bound, at_least=False))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def as_dict(self) -> dict[str, Any]:
        given = {k: v for k, v in vars(self.args).items() if k not in ("out", "check")}
        options = {name: _plain(value) for name, value in given.items()}
        return {
            "benchmark": self.name,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": self.machine,
            "options": options,
            "rows": [{k: _plain(v) for k, v in row.items()} for row in self.rows],
            "ratios": [asdict(ratio) | {"met": ratio.met} for ratio in self.ratios],
            "notes": self.notes,
            **self.extra,
        }

    def finish(self, draw: Callable[[Any, Report], None]) -> int:
        """Prints everything, writes `<name>.json` and `<name>.png`, and returns the exit code."""
        print("\n\n" + table(self.rows) + "\n")
        for ratio in self.ratios:
            print(ratio.line())
        for text in self.notes:
            print(f"note: {text}")
        if self.args.quick and self.ratios:
            print("note: --quick: the sizes are not those of the bounds")
        self.args.out.mkdir(parents=True, exist_ok=True)
        path = self.args.out / f"{self.name}.json"
        path.write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n")
        print(f"written: {path}")
        self._picture(draw)
        return int(self.args.check and not all(ratio.met for ratio in self.ratios))

    def _picture(self, draw: Callable[[Any, Report], None]) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            print("no picture: pip install matplotlib")
            return
        figure = Figure(figsize=(9, 5), layout="constrained")
        draw(figure, self)
        facts = self.machine
        figure.suptitle(
            f"{self.name}: {facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}",
            fontsize=9,
        )
        path = self.args.out / f"{self.name}.png"
        figure.savefig(path, dpi=120)
        print(f"written: {path}")


def bars(axes: Any, names: Sequence[str], values: Sequence[float], label: str) -> None:
    """A horizontal bar per name, the first on top, each with its value."""
    places = list(range(len(names)))
    ours = ["tab:blue" if name.startswith("ctx") else "0.7" for name in names]
    drawn = axes.barh(places, values, color=ours)
    labels = [f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values]
    axes.bar_label(drawn, labels, padding=3, fontsize=7)
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlabel(label, fontsize=8)


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _plain(value: Any) -> Any:
    if isinstance(value, Timing):
        return {"median": value.median, "spread": value.spread, "samples": value.samples}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    if isinstance(value, Path):
        return value.name  # folders are this machine's affair
    return asdict(value) if isinstance(value, Estimate) else value


def _text(value: Any) -> str:
    if isinstance(value, Timing):
        return f"{duration(value.median)} ±{100 * value.spread:.0f}%"
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table; a column that a row lacks stays empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_text(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
