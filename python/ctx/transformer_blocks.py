"""The blocks of a decoder language model: attention and MLP around a residual stream."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ctx.attention import CompressiveAttention
from ctx.engine import Plan
from ctx.memory import Memory
from ctx.transformer_config import CompressiveTransformerConfig

__all__ = ["MLP", "Block", "attention_of", "make_norm"]


def make_norm(config: CompressiveTransformerConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.embed_dim, eps=1e-6)
    return nn.LayerNorm(config.embed_dim, bias=config.bias)


class MLP(nn.Module):
    """x [B, T, E] -> [B, T, E]; "swiglu" (Shazeer 2020, arXiv:2002.05202) or "gelu"."""

    def __init__(self, config: CompressiveTransformerConfig) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        inner = config.mlp_dim
        if inner is None:  # equal parameters: the gated form has three matrices, not two
            inner = 4 * config.embed_dim
            inner = -(-2 * inner // 24) * 8 if self.gated else inner
        self.up = nn.Linear(config.embed_dim, 2 * inner if self.gated else inner, bias=config.bias)
        self.down = nn.Linear(inner, config.embed_dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.up(x)
        if self.gated:
            gate, value = hidden.chunk(2, -1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden)
        out: Tensor = self.down(hidden)
        return out


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: CompressiveTransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = CompressiveAttention(**config.attention(layer))
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        memory: Memory | None,
        plan: Plan,
        update: bool,
        return_aux: bool,
        return_region_weights: bool,
    ) -> tuple[Tensor, Memory | None, list[Tensor]]:
        """x and the layer's memory after the tokens, and what was asked for besides, loss first."""
        y, memory, *asked = self.attention(
            self.attention_norm(x),
            memory,
            update=update,
            return_aux=return_aux,
            return_region_weights=return_region_weights,
            plan=plan,
        )
        x = x + y  # dropped out by the layer itself
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, memory, asked


def attention_of(block: nn.Module, index: int) -> CompressiveAttention:
    """The attention of a block, also where a module wraps either."""
    usual = getattr(block, "attention", None)
    if isinstance(usual, CompressiveAttention):  # a search costs more than a check of a memory
        return usual
    for module in block.modules():
        if isinstance(module, CompressiveAttention):
            return module
    raise TypeError(
        "ctx.CompressiveTransformer: blocks must each have a ctx.CompressiveAttention, "
        f"got none in blocks[{index}], a {type(block).__name__}"
    )
