"""`ctx train --param-count`: how many parameters a configuration has, and where."""

from __future__ import annotations

import dataclasses

import torch

from ctx.recipes.presets import Preset
from ctx.transformer import CompressiveTransformer, CompressiveTransformerConfig

__all__ = ["count", "report"]

# The first part that a parameter's name has belongs to it.
_PARTS: dict[str, tuple[str, ...]] = {
    "embedding": ("embedding",),
    "output layer": ("head",),
    "compressors": ("compressor",),
    "decoders of the auto-encoding loss": ("decoder",),
    "norms": ("norm", "attention_norm", "mlp_norm"),
    "MLP": ("mlp",),
    "attention": ("attention",),
}
_SHOWN = ("embedding", "attention", "compressors", "MLP", "norms")  # also where there are none


def count(config: CompressiveTransformerConfig) -> dict[str, int]:
    """Parameters by part, in a model that is built on the meta device: no memory, no time."""
    with torch.device("meta"):
        model = CompressiveTransformer(config)
    counts = dict.fromkeys(_PARTS, 0)
    for name, parameter in model.named_parameters():
        words = set(name.split("."))
        part = next(part for part, marks in _PARTS.items() if words & set(marks))
        counts[part] += parameter.numel()
    return {part: n for part, n in counts.items() if n or part in _SHOWN}


def report(config: CompressiveTransformerConfig, preset: Preset | None) -> str:
    """Lines of text: the counts, and for a preset what the paper says and where we differ."""
    if preset is not None:
        config = dataclasses.replace(config, vocab_size=preset.vocab_size)
    counts = count(config)
    rows = {**counts, "total": sum(counts.values())}
    rows["total without compressors"] = rows["total"] - counts["compressors"]
    width = max(map(len, rows))
    lines = [f"{part:<{width}}  {n:>13,}" for part, n in rows.items()]
    lines.insert(-2, "-" * len(lines[0]))
    if preset is not None:
        lines.append(f"published: {preset.published}")
        lines.append(f"vocabulary: {preset.vocab_size:,}, and 256 bytes in training here")
        lines.extend(f"unlike the paper: {text}" for text in preset.unlike)
        lines.append("not trained here")
    return "\n".join(lines)
