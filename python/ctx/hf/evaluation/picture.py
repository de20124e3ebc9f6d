"""A picture of losses along a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ctx.hf.evaluation.statistics import block_means
from ctx.hf.evaluation.streaming import Scores

__all__ = ["draw"]

_COLOURS = ("black", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


def draw(path: Path, scores: Sequence[Scores], block: int) -> bool:
    """Draws the mean loss of blocks of tokens against their position, a line for each candidate.

    Args:
        path: of the picture; its ending says the format.
        scores: the candidates'.
        block: tokens of a block.

    Returns:
        False where matplotlib is not installed.

    Raises:
        OSError: it cannot be written.
        ValueError: matplotlib does not know the format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for number, one in enumerate(scores):
        losses = block_means(one.losses, block).tolist()
        width = len(one.losses) / len(losses)
        places = [one.first + width * (index + 0.5) for index in range(len(losses))]
        axes.plot(
            places, losses, "." if len(losses) == 1 else "-", linewidth=1.2,
            color=_COLOURS[number % len(_COLOURS)], label=one.name,
        )  # fmt: skip
    axes.set(xlabel="tokens", ylabel=f"nats per token, means of {block}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return True
