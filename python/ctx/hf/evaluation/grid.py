"""Tables over budgets and ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ctx.hf.budgets import schedule_of
from ctx.hf.evaluation.candidates import (
    Candidate,
    compressive,
    fitted,
    full_cache,
    window_and_sinks,
)
from ctx.hf.evaluation.comparison import Comparison, compare
from ctx.hf.evaluation.tables import aligned, cells, percent
from ctx.hf.evaluation.windows import score

__all__ = ["Grid", "candidates_of", "score_grid", "table"]

#: {(slots, ratio): what makes slots}: None for their mean, a compressor's name or module, or what
#: :func:`ctx.hf.load_compressors` gives.
Grid = Mapping[tuple[int, int], Any]


def candidates_of(
    compressors: Grid, *, share: float = 0.5, sinks: int = 4, distance: str = "slot"
) -> list[Candidate]:
    """The full cache, a window with sinks for each budget, and a memory for each entry.

    Args:
        compressors: by budget and ratio.
        share: of the slots besides sinks that are compressed ones; but for loaded compressors,
            which have sizes.
        sinks: first tokens kept.
        distance: of all but loaded compressors.

    Returns:
        The full cache first; a memory's baseline is the window of its budget.

    Raises:
        ValueError: loaded compressors attend to more slots than their budget, or are of another
            ratio.
    """
    made = [full_cache()]
    for slots in dict.fromkeys(slots for slots, _ in compressors):
        made.append(window_and_sinks(slots, sinks=sinks, distance=distance))
        base = made[-1].name
        for (budget, ratio), compressor in compressors.items():
            if budget != slots:
                continue
            name = _name(slots, ratio)
            if hasattr(compressor, "schedules"):
                _check_fits(compressor, slots, ratio)
                made.append(fitted(name, compressor, baseline=base))
                continue
            schedule = schedule_of(slots, round(share * (slots - sinks)), ratio, sinks)
            how = "mean" if compressor is None else compressor
            made.append(compressive(name, schedule, how, distance=distance, baseline=base))
    return made


def _name(slots: int, ratio: int) -> str:
    return f"{slots} slots, ratio {ratio}"


def _check_fits(compressors: Any, slots: int, ratio: int) -> None:
    where = "ctx.hf.evaluation.grid"
    for schedule in compressors.schedules:
        if schedule.max_slots > slots:
            raise ValueError(
                f"{where}: compressors of {slots} slots must attend to no more, "
                f"got {schedule.max_slots} of {schedule}"
            )
        if schedule.compressed and schedule.ratio != ratio:
            raise ValueError(f"{where}: ratio must be {ratio}, got {schedule}")


def score_grid(
    model: Any,
    windows: Sequence[Tensor],
    compressors: Grid,
    *,
    share: float = 0.5,
    sinks: int = 4,
    distance: str = "slot",
    start: int = 2048,
    chunk: int = 512,
    kl: bool = True,
    advance: Callable[[int], None] | None = None,
) -> list[Comparison]:
    """All of a grid over the same windows, side by side; a line for each candidate.

    Args:
        model, windows, start, chunk, kl, advance: as in :func:`ctx.hf.evaluation.windows.score`.
        compressors, share, sinks, distance: as in :func:`candidates_of`.
    """
    candidates = candidates_of(compressors, share=share, sinks=sinks, distance=distance)
    return compare(
        score(model, windows, candidates, start=start, chunk=chunk, kl=kl, advance=advance)
    )


def table(lines: Sequence[Comparison], compressors: Grid) -> str:
    """Perplexity and the share of the gap closed: a row per budget, a column per ratio.

    Args:
        lines: of :func:`score_grid`.
        compressors: the grid.
    """
    by_name = {line.name: line for line in lines}
    ratios = sorted({ratio for _, ratio in compressors})
    rows = [["slots", "window + sinks", *(f"ratio {ratio}" for ratio in ratios)]]
    for slots in sorted({slots for slots, _ in compressors}):
        row = [f"{slots}", cells(by_name[window_and_sinks(slots).name])["perplexity"]]
        for ratio in ratios:
            line = by_name.get(_name(slots, ratio))
            parts = [] if line is None else [cells(line)["perplexity"], percent(line.share)]
            row.append(", ".join(filter(None, parts)))
        rows.append(row)
    full = cells(by_name[full_cache().name])["perplexity"]
    return f"{aligned(rows)}\n\nfull cache: {full}; perplexity, share of the gap closed"
