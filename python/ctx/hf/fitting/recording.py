"""What attention is given and makes under the full cache, recorded layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctx.hf import plain
from ctx.hf.fitting.excerpts import Excerpts
from ctx.hf.fitting.hooked import attention_taken_over, output_weight

__all__ = ["Recorded", "record"]


@dataclass
class Recorded:
    """One layer over all excerpts; keys and queries rotated as the model does it.

    Attributes:
        keys, values: [excerpts, Hkv, T, D] and [excerpts, Hkv, T, Dv].
        q: of the chosen queries, [excerpts, H, Q, D].
        out: what the full cache gives them, [excerpts, H, Q, Dv].
        every_q: of all tokens, [excerpts, H, T, D]; where slots are chosen by attention received.
        weight: [E, H * Dv], by which outputs go on.
        scale, softcap: of the scores.
    """

    keys: Tensor
    values: Tensor
    q: Tensor
    out: Tensor
    every_q: Tensor | None
    weight: Tensor
    scale: float
    softcap: float | None


@torch.no_grad()
def record(
    model: Any, excerpts: Excerpts, every_query: bool, advance: Callable[[], None]
) -> list[Recorded]:
    """Runs a model over excerpts, one after the other, under full attention.

    Args:
        every_query: whether all queries are wanted.
        advance: called after each excerpt.
    """
    found: dict[int, list[dict[str, Any]]] = {}
    device = next(model.parameters()).device

    def attend(
        number: int, module: nn.Module, q: Tensor, k: Tensor, v: Tensor,
        scale: float, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        out = plain.attend(q, k, v, None, 0.0, scale, softcap, True)
        at = excerpts.queries[excerpt].to(q.device)
        found.setdefault(number, []).append(
            {
                "keys": k[0].clone(), "values": v[0].clone(), "q": q[0, :, at],
                "out": out[0, at].transpose(0, 1).contiguous(),
                "every_q": q[0].clone() if every_query else None,
                "weight": output_weight(module, out.shape[2] * out.shape[3]),
                "scale": scale, "softcap": softcap,
            }
        )  # fmt: skip
        return out

    with attention_taken_over(model, attend):
        for excerpt in range(len(excerpts.tokens)):
            model(excerpts.tokens[excerpt][None].to(device), use_cache=False, logits_to_keep=1)
            advance()
    made = []
    for number in range(len(found)):
        parts = found.pop(number)
        names = ("keys", "values", "q", "out")
        stacked: dict[str, Any] = {
            name: torch.stack([part[name] for part in parts]) for name in names
        }
        every = torch.stack([part["every_q"] for part in parts]) if every_query else None
        last: dict[str, Any] = {name: parts[0][name] for name in ("weight", "scale", "softcap")}
        made.append(Recorded(**stacked, every_q=every, **last))
    return made
