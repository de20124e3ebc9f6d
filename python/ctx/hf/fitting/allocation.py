"""Entries shared out among layers: more where the model's predictions need them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctx.hf.fitting.excerpts import Excerpts, drawn_positions
from ctx.hf.fitting.settings import FitSettings
from ctx.hf.fitting.whole import logits_at
from ctx.hf.layer_law import LayerLaw
from ctx.hf.model import layers_of

__all__ = ["OneLayer", "allocate", "further_sizes", "held_out"]


def allocate(losses: Sequence[Mapping[int, float]], total: int) -> list[int]:
    """A size for each layer: those of the smallest sum of losses whose own sum is at most `total`.

    An exact dynamic program over the entries used. It takes losses of layers as if they added up.

    Args:
        losses: for each layer, what each size that it may get costs.
        total: entries of all layers.

    Raises:
        ValueError: even the smallest sizes are more than `total`.
    """
    # Entries used so far, to (loss, sizes chosen); only sums that some choice has.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for layer in losses:
        further: dict[int, tuple[float, list[int]]] = {}
        for used, (loss, chosen) in best.items():
            for size, cost in layer.items():
                found = further.get(used + size)
                if used + size <= total and (found is None or loss + cost < found[0]):
                    further[used + size] = (loss + cost, [*chosen, size])
        best = further
    if not best:
        least = sum(min(layer) for layer in losses)
        raise ValueError(f"total must be at least {least}, the smallest sizes, got {total}")
    return min(best.values(), key=lambda found: found[0])[1]


def further_sizes(costs: Sequence[float], settings: FitSettings) -> list[tuple[int, int]]:
    """(layer, size) of what remains to be measured when layers of `slots` cost so much.

    Larger sizes only of layers that cost more than the mean: the others have little to gain.
    """
    s, mean = settings, sum(costs) / len(costs)
    smaller = [(layer, x) for layer in range(len(costs)) for x in s.sizes if x < s.slots]
    larger = [
        (layer, x) for layer, cost in enumerate(costs) if cost >= mean
        for x in s.sizes if x > s.slots
    ]  # fmt: skip
    return smaller + larger


def held_out(excerpts: Excerpts, settings: FitSettings) -> tuple[Tensor, Tensor]:
    """The first validation excerpt, and positions in its second half."""
    s, generator = settings, torch.Generator().manual_seed(settings.seed + 2)
    half = s.excerpt_tokens // 2
    at = drawn_positions(half, s.excerpt_tokens, s.end_to_end_queries, generator)
    return excerpts.tokens[excerpts.validating[0]], at


class OneLayer:
    """What a model predicts of one text while a single layer attends over a memory.

    The layers in front of it give what they gave under the full cache, and are not run again.

    Args:
        model: frozen.
        tokens: int64 [T].
        positions: int64 [Q], whose predictions are compared.
    """

    def __init__(self, model: Any, tokens: Tensor, positions: Tensor) -> None:
        device = next(model.parameters()).device
        self.model, self.tokens, self.positions = model, tokens.to(device), positions.to(device)
        config = model.config.get_text_config(decoder=True)
        own = layers_of(config, "ctx.hf.fit")
        #: The decoder's layers that have full attention, and what each layer gave.
        self.own = [at for at, layer in enumerate(own) if layer is None]
        self.blocks = _blocks(model, len(own))
        self.given: list[Any] = []
        with contextlib.ExitStack() as hooks:
            for block in self.blocks:
                hook = block.register_forward_hook(lambda _, __, out: self.given.append(out))
                hooks.callback(hook.remove)
            self.full = self._predicted([None] * len(self.own))

    def _predicted(self, laws: Sequence[LayerLaw | None]) -> Tensor:
        logits = logits_at(self.model, laws, self.tokens, self.positions)
        return torch.log_softmax(logits, -1)

    @torch.no_grad()
    def kl(self, number: int, law: LayerLaw) -> float:
        """KL(full ‖ with this law in one layer), nats per position.

        Args:
            number: of the layer, among those of full attention.
            law: measured.
        """
        laws: list[LayerLaw | None] = [None] * len(self.own)
        laws[number] = law
        with self._begun_at(self.own[number]):
            got = self._predicted(laws)
        return float((self.full.exp() * (self.full - got)).sum(-1).mean())

    @contextlib.contextmanager
    def _begun_at(self, layer: int) -> Iterator[None]:
        """In it the decoder's layers in front of one give what they gave."""
        with contextlib.ExitStack() as back:
            for block, given in zip(self.blocks[:layer], self.given, strict=False):
                back.enter_context(_replaced(block, given))
            yield


def _blocks(model: nn.Module, number: int) -> list[nn.Module]:
    """The decoder's layers, first layer first; none where they cannot be told."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [block for block in model.modules() if isinstance(block, GradientCheckpointingLayer)]
    return found if len(found) == number else []


@contextlib.contextmanager
def _replaced(block: nn.Module, given: Any) -> Iterator[None]:
    """In it a module's forward gives the same, whatever comes."""
    before = block.__dict__.get("forward")
    block.forward = lambda *_, **__: given
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before
