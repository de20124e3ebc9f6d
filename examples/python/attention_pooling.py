"""A compressor of one's own, without a line of C++: attention pooling with learned queries.

Every kv head has a query for keys and one for values; a slot is the mean of its c tokens, weighted
by the softmax of query . key (the pooling of Set Transformer, Lee et al. 2019, arXiv:1810.00825,
with one seed). Unlike the built-in `gated`, place in the group plays no part.

    python examples/python/attention_pooling.py

fits it for some seconds to a stream in which one token of four, marked by its key, is all that
queries look for: by the paper's attention reconstruction, and nothing else. Then streams fresh
tokens through memories that differ in their compressor alone, and prints how far what they
remember is from attention to all tokens.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import ctx
from ctx.compression import Compressor, Mean, register
from ctx.losses import Evictions, attention_reconstruction

RATIO, HEADS, WIDTH = 4, 2, 16
SLOTS, WINDOW = 32, 16


@register  # from here on `compressor="attention_pooling"` works wherever a name does
class AttentionPooling(Compressor):
    """slot = sum_i softmax_i(key_i . query) x_i, for x the keys and the values."""

    name = "attention_pooling"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """What the base class makes parameters of, under these names."""
        shape = (self.kv_heads, self.head_dim)
        return {"key_query": shape, "value_query": shape}

    # The inherited reset_parameters fills them with zeros: it starts as mean pooling.

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, Hkv, G, c, D], values [B, Hkv, G, c, Dv] -> [B, Hkv, G, D], [B, Hkv, G, Dv].

        The same tokens give the same slot, whatever stands beside them: streams and training must
        agree.
        """
        pooled = []
        for x, query in ((keys, self.key_query), (values, self.value_query)):
            scores = torch.einsum("bhgcd,hd->bhgc", keys, query)
            pooled.append(torch.einsum("bhgc,bhgcd->bhgd", scores.softmax(-1), x))
        return pooled[0], pooled[1]


class Source:
    """Draws streams: in every head one key of a group points along a mark, as all queries do."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.mark = 3 * torch.nn.functional.normalize(self._normal(HEADS, 1, WIDTH), dim=-1)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def draw(self, rows: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [rows, HEADS, groups * RATIO, WIDTH] each."""
        shape = (rows, HEADS, groups * RATIO, WIDTH)
        queries, keys, values = (self._normal(*shape) for _ in range(3))
        marked = torch.randint(RATIO, (rows, 1, groups, 1), generator=self.generator)
        places = torch.arange(groups)[:, None] * RATIO + marked
        keys.scatter_add_(2, places.expand(-1, HEADS, -1, WIDTH), self.mark.expand(
            rows, HEADS, groups, WIDTH))  # fmt: skip
        return queries + self.mark, keys, values


def fit(compressor: Compressor, source: Source, steps: int) -> list[float]:
    """Trains by attention reconstruction (algorithm 2 of the paper); returns the loss of steps."""
    optimizer = torch.optim.Adam(compressor.parameters(), lr=0.05)
    history = []
    for _ in range(steps):
        queries, keys, values = source.draw(16, 8)
        # One boundary, N = 1, at which all 8 groups leave and all queries ask.
        groups = [x.unflatten(2, (8, RATIO)).unsqueeze(2) for x in (keys, values)]
        asked = torch.ones(16, 1, queries.shape[2], dtype=torch.bool)
        due = torch.ones(16, 1, 8, dtype=torch.bool)
        evicted = Evictions(queries.unsqueeze(2), asked, groups[0], groups[1], due)
        loss = attention_reconstruction(evicted, compressor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def forgotten(compressor: Compressor, source: Source) -> float:
    """Mean squared error of a stream's outputs against attention to every token, relative."""
    queries, keys, values = source.draw(8, SLOTS + WINDOW // RATIO)
    bounded = ctx.Schedule(window=WINDOW, compressed=SLOTS, ratio=RATIO)
    unbounded = ctx.Schedule(window=keys.shape[2], compressed=0, ratio=1)
    outputs = []
    for schedule, kind in ((bounded, compressor), (unbounded, "mean")):
        memory = ctx.KVMemory(schedule, 8, HEADS, WIDTH, compressor=kind, position=None)
        chunks = zip(*(x.split(5, 2) for x in (queries, keys, values)), strict=True)
        outputs.append(torch.cat([memory.step(*chunk) for chunk in chunks], 2))
    late = [x[:, :, -WINDOW:] for x in outputs]  # these see slots of nearly everything
    return ((late[0] - late[1]).square().mean() / late[1].square().mean()).item()


def main() -> None:
    """Prints the loss, and the errors of two memories of the same size."""
    parser = argparse.ArgumentParser(description="A compressor of one's own.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    source = Source(args.seed)
    pooling = AttentionPooling(HEADS, RATIO, WIDTH)
    history = fit(pooling, source, args.steps)
    print(f"attention reconstruction: {history[0]:.4f} at first, {history[-1]:.4f} at last")
    with torch.no_grad():
        for compressor in (Mean(HEADS, RATIO, WIDTH), pooling):
            error = forgotten(compressor, Source(args.seed))
            print(f"error of a stream, {compressor.name:<17} {error:.3f}")


if __name__ == "__main__":
    main()
