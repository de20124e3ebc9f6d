"""Peer: compressive-transformer-pytorch 0.4.0, segment by segment at equal sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ctx
from benchmarks._harness import interleave
from benchmarks._report import Report

__all__ = ["DEFECTS", "INSTALL", "TITLE", "measure"]

TITLE = "compressive-transformer-pytorch"
INSTALL = "pip install compressive-transformer-pytorch==0.4.0"
DEFECTS = (
    "compressive-transformer-pytorch 0.4.0 takes its key/value projection out of training at the "
    "first compression (and so saves that gradient), reconstructs attention over the wrong span "
    "where the memory is longer than a segment, and stores nothing of a segment shorter than its "
    "length while rotating its memories across layers, so that generation scrambles them"
)
VOCABULARY = 256


def measure(report: Report) -> None:
    """Forward and training step of one segment; memories full; float32.

    Its gates (a GRU per branch) are off in "plain": that is our block. Both train the compressor by
    attention reconstruction alone, as it does.
    """
    quick = report.args.quick
    size, dim, depth, heads = (16, 32, 2, 2) if quick else (512, 512, 6, 8)
    models: dict[str, Any] = {
        "ctx": _Ours(size, dim, depth, heads),
        f"{TITLE}, plain": _Theirs(size, dim, depth, heads, gated=False),
        f"{TITLE}, as it comes": _Theirs(size, dim, depth, heads, gated=True),
    }
    # The forward pass on copies, so that training stays out of it.
    forwards: dict[str, Callable[[], object]] = {
        name: copy.deepcopy(model).eval().forward for name, model in models.items()
    }
    what = f"dim {dim}, depth {depth}, segment, window and slots {size}"
    with torch.no_grad():
        times = interleave(forwards, report.args.repeat)
    _write(report, f"forward, {what}", models, times)
    trained: dict[str, Callable[[], object]] = {
        n: m.train().training_step for n, m in models.items()
    }
    times = interleave(trained, report.args.repeat)
    _write(report, f"training step, {what}", models, times)
    report.note(DEFECTS)


def _write(report: Report, what: str, models: dict[str, Any], times: dict[str, Any]) -> None:
    ours = times["ctx"].median
    for name, timing in times.items():
        parameters = sum(part.numel() for part in models[name].model.parameters()) / 1e6
        report.row(
            peer=TITLE,
            what=what.split(",")[0],
            who=name,
            time=timing,
            **{"ctx is faster by": timing.median / ours, "million parameters": parameters},
        )
    peer = f"{TITLE}, plain"
    report.at_least("5", f"{what}, times as fast as {peer}", times[peer].median / ours, 2.0)


class _Trainer(nn.Module):
    """A model, its optimizer, and one segment of bytes that comes again and again."""

    model: nn.Module
    memory: Any = None

    def begin(self, size: int) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.tokens = torch.randint(VOCABULARY, (1, size))
        self.targets = torch.randint(VOCABULARY, (size,))
        self.eval()
        with torch.no_grad():
            for _ in range(6):  # window first, then four segments to a quarter of the slots each
                self.forward()

    def step_with(self, logits: Tensor, aux: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        (F.cross_entropy(logits[0], self.targets) + aux.sum()).backward()
        self.optimizer.step()


class _Ours(_Trainer):
    def __init__(self, size: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        config = ctx.CompressiveTransformerConfig(
            vocab_size=VOCABULARY,
            embed_dim=dim,
            num_layers=depth,
            num_heads=heads,
            window=size,
            compressed=size,
            ratio=4,
            segment=size,
            max_rewind=size,
            compressor="conv",
            compressor_grad="aux",
            aux_loss="reconstruction",
            mlp="gelu",
            norm="layer",
            tied=False,
        )
        self.model = ctx.CompressiveTransformer(config)
        self.begin(size)

    def forward(self) -> Tensor:
        logits, self.memory = self.model(self.tokens, self.memory)
        return logits

    def training_step(self) -> None:
        logits, self.memory, aux = self.model(self.tokens, self.memory, return_aux=True)
        self.step_with(logits, aux)


class _Theirs(_Trainer):
    def __init__(self, size: int, dim: int, depth: int, heads: int, gated: bool) -> None:
        super().__init__()
        from compressive_transformer_pytorch import CompressiveTransformer

        self.model = CompressiveTransformer(
            num_tokens=VOCABULARY,
            dim=dim,
            depth=depth,
            heads=heads,
            seq_len=size,
            mem_len=size,
            cmem_len=size,
            cmem_ratio=4,
            gru_gated_residual=gated,
        )
        self.begin(size)

    def forward(self) -> Tensor:
        logits, self.memory, _ = self.model(self.tokens, self.memory)
        return logits

    def training_step(self) -> None:
        logits, self.memory, aux = self.model(self.tokens, self.memory)
        self.step_with(logits, aux)
