"""All layers' compressors fitted together: what the whole model says under the full cache against
what it says over the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctx import engine
from ctx.compression import MostUsed
from ctx.engine import Plan
from ctx.hf import plain
from ctx.hf.fitting.excerpts import random_excerpt
from ctx.hf.fitting.hooked import attention_taken_over
from ctx.hf.fitting.settings import FitSettings
from ctx.hf.layer_law import LayerLaw
from ctx.memory import Memory
from ctx.spec import Spec

__all__ = ["WholeFit", "compressed_attention", "logits_at"]


def compressed_attention(
    law: LayerLaw, plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """A layer's attention over a whole text as its memory would give it; differentiable.

    Args:
        plan: of new streams.
        q, k, v: [B, H, T, D], [B, Hkv, T, D] and [B, Hkv, T, Dv]; q and k as the model rotated
            them.

    Returns:
        [B, T, H, Dv].
    """
    place = torch.arange(q.shape[2], device=q.device, dtype=torch.float64).expand(len(q), -1)
    q = engine.rotary(q, -place, law.unrotating)
    numbers, scores = law.scored(scale, softcap), law.scores(q)
    groups = engine.evicted_groups(k, v, plan, (), numbers)
    slots: Sequence[Tensor]
    if law.by_usage:
        with torch.no_grad():
            rings = Memory.empty(Spec((law.spec,)), len(q), k.dtype, k.device).rings[0]
            made = engine.step(q, k, v, plan, rings, numbers, (), scores, False)
        keys, values = (MostUsed.take(x, made[2]) for x in groups)
        slots = (keys, values, keys.new_zeros(keys.shape[:3]), made[3])
    else:
        slots = law.compressor.slots(*groups, mass=True)
    out, *_ = engine.attend(q, k, v, plan, (), numbers, slots, scores, False)
    return out.transpose(1, 2)


def logits_at(
    model: Any, laws: Sequence[LayerLaw | None] | None, tokens: Tensor, positions: Tensor
) -> Tensor:
    """What a model says at positions [Q] of tokens [T], [Q, vocabulary], float32.

    Args:
        laws: of the memories of the full-attention layers; None in place of one that sees
            everything, or of all.
    """
    inputs = {"input_ids": tokens[None], "use_cache": False, "logits_to_keep": positions}
    if laws is None:
        return model(**inputs).logits[0].float()  # type: ignore[no-any-return]
    number = torch.arange(len(tokens), device=tokens.device)[None]
    bounded = [law for law in laws if law is not None]
    plans = engine.plans(bounded, None, number, None, None, False) if bounded else {}

    def attend(
        layer: int, module: nn.Module, q: Tensor, k: Tensor, v: Tensor,
        scale: float, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        law = laws[layer]
        if law is None:
            return plain.attend(q, k, v, None, 0.0, scale, softcap, True)
        return compressed_attention(law, plans[law.plan_key], q, k, v, scale, softcap)

    with attention_taken_over(model, attend):
        return model(**inputs).logits[0].float()  # type: ignore[no-any-return]


class WholeFit:
    """KL(full ‖ compressed) of random excerpts, minimised by Adam over all compressors and biases.

    Args:
        model: frozen; its weights get no gradient.
        laws: measured, with a bias each.
        texts: int64 [n] each.
    """

    def __init__(
        self, model: Any, laws: Sequence[LayerLaw], texts: Sequence[Tensor], settings: FitSettings
    ) -> None:
        self.model, self.laws, self.texts, self.settings = model, laws, texts, settings
        self.generator = torch.Generator().manual_seed(settings.seed + 1)
        self.parameters: list[Tensor] = []
        for law in laws:
            assert law.bias is not None
            if law.schedule.compressed:
                self.parameters += [*law.compressor.parameters(), law.bias]
        self.optimizer = None
        if self.parameters:
            lr = settings.end_to_end_lr
            self.optimizer = torch.optim.Adam(self.parameters, lr=lr, betas=(0.9, 0.98))
        self.losses: list[float] = []

    def run(self, advance: Callable[[WholeFit], None]) -> None:
        """The steps that are left; `advance` is called after each."""
        if self.optimizer is None:
            return
        with torch.enable_grad():
            while len(self.losses) < self.settings.end_to_end_steps:
                self.losses.append(self._step(self.optimizer))
                advance(self)

    def _step(self, optimizer: torch.optim.Optimizer) -> float:
        s, step = self.settings, len(self.losses)
        tokens, at = random_excerpt(
            self.texts, s.end_to_end_tokens, s.end_to_end_queries, s.first_query, self.generator
        )
        device = next(self.model.parameters()).device
        tokens, at = tokens.to(device), at.to(device)
        with torch.no_grad():
            wanted = torch.log_softmax(logits_at(self.model, None, tokens, at), -1)
        got = torch.log_softmax(logits_at(self.model, self.laws, tokens, at), -1)
        loss = torch.nn.functional.kl_div(got, wanted, reduction="batchmean", log_target=True)
        warm = min(1.0, (step + 1) / 5)
        for group in optimizer.param_groups:
            group["lr"] = s.end_to_end_lr * warm * (1 - step / s.end_to_end_steps)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        optimizer.step()
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` goes on from."""
        return {
            "losses": list(self.losses),
            "parameters": [x.detach().clone() for x in self.parameters],
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
            "generator": self.generator.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state`."""
        if self.optimizer is None:
            return
        with torch.no_grad():
            for mine, kept in zip(self.parameters, state["parameters"], strict=True):
                mine.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.losses = list(state["losses"])
