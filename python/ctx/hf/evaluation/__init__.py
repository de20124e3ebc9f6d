"""What a bounded cache is worth on long texts: losses of the same tokens under several caches.

    full = candidates.full_cache()
    window = candidates.window_and_sinks(512)
    mean = candidates.compressive("mean", schedule_of(512, 252, ratio=4), baseline=window.name)
    samples = windows.score(model, windows.cut(ids), [full, window, mean])
    print(tables.markdown(compare(samples)))

Besides windows of a text: passages that repeat (`repeats`), facts that are asked for later
(`needles`), and tables over budgets and ratios (`grid`). transformers is imported when a cache
is made.
"""

from __future__ import annotations

from ctx.hf.budgets import schedule_of
from ctx.hf.evaluation import candidates, needles, repeats, statistics, tables, windows
from ctx.hf.evaluation.candidates import Candidate
from ctx.hf.evaluation.comparison import Comparison, Samples, compare
from ctx.hf.evaluation.statistics import Estimate
from ctx.hf.evaluation.streaming import Scores, stream

__all__ = [
    "Candidate",
    "Comparison",
    "Estimate",
    "Samples",
    "Scores",
    "candidates",
    "compare",
    "needles",
    "repeats",
    "schedule_of",
    "statistics",
    "stream",
    "tables",
    "windows",
]
