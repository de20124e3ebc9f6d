"""One training run: model, optimiser, streams and the memory that is carried along."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctx.memory import Memory
from ctx.recipes.data import Corpus, Streams
from ctx.recipes.errors import RecipeError
from ctx.recipes.settings import TrainSettings
from ctx.state import TENSORS
from ctx.transformer import CompressiveTransformer, CompressiveTransformerConfig

__all__ = ["Trainer"]


class Trainer:
    """Trains step by step; `state` and `load` make it continue bit for bit.

    All that a step depends on is in `state`: weights, optimiser, gradients that wait for their
    update, memory, position in the text (the step itself) and random numbers. Nothing may depend on
    time.
    """

    def __init__(
        self, config: CompressiveTransformerConfig, settings: TrainSettings, corpus: Corpus
    ) -> None:
        self.settings, self.corpus = settings, corpus
        self.streams = Streams(corpus.training, settings.batch, settings.length)
        torch.manual_seed(settings.seed)
        self.model = CompressiveTransformer(config)
        self.optimizer = _optimizer(self.model, settings)
        self.memory: Memory | None = None
        self.step = 0
        self.seconds = 0.0

    def train_step(self) -> dict[str, float]:
        """One step on the next chunk of every stream; returns what there is to know about it.

        Gradients are summed until `settings.updates` says that the optimiser acts, on their mean:
        a larger batch (section 5.5.1 of the paper). Steps between have no `grad_norm`.

        Raises:
            RecipeError: the loss is not finite; the model is as it was before the step.
        """
        began = time.perf_counter()
        tokens, targets = self.streams.chunk(self.step)
        lr = self.settings.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        memory = None if self.streams.starts(self.step) else self.memory
        with_aux = self.model.config.aux_loss is not None
        logits, memory, *aux = self.model(tokens, memory, return_aux=with_aux)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        total = loss + self.settings.aux_weight * aux[0] if aux else loss
        if not math.isfinite(total.item()):
            raise self._not_finite()
        total.backward()
        gathered = self.settings.gathered(self.step + 1)
        norm = self._update(gathered) if self.settings.updates(self.step) else None
        self.memory = memory
        self.step += 1
        took = time.perf_counter() - began
        self.seconds += took
        return {
            "step": self.step,
            "bits_per_byte": loss.item() / math.log(2),
            "lr": lr,
            **({} if norm is None else {"grad_norm": norm}),
            **({"aux_loss": aux[0].item()} if aux else {}),
            "tokens_per_second": tokens.numel() / took,
            "seconds": self.seconds,
        }

    def _update(self, gathered: int) -> float:
        """The optimiser's step on the mean of `gathered` gradients; returns its norm, unclipped."""
        if gathered > 1:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= gathered
        clip = self.settings.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip).item()
        if not math.isfinite(norm):
            raise self._not_finite()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _not_finite(self) -> RecipeError:
        return RecipeError(f"the loss is not finite at step {self.step + 1}: lower `lr`")

    def state(self) -> dict[str, Any]:
        """The parts of a checkpoint that the trainer knows."""
        return {
            "config": self.model.config.to_dict(),
            "settings": dataclasses.asdict(self.settings),
            "step": self.step,
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "gradients": {
                name: parameter.grad
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None
            },
            "memory": None if self.memory is None else self.memory.state_dict(),
            "rng": torch.get_rng_state(),
            "seconds": self.seconds,
        }

    def _carried(self, memory: dict[str, Any] | list[dict[str, Tensor]] | None) -> Memory | None:
        """A checkpoint's memory. Before there was :class:`ctx.Memory`, checkpoints had a dict of
        tensors per layer, each with counters of its own, which were equal.
        """
        if memory is None:
            return None
        made = self.model.init_memory(self.settings.batch)
        if isinstance(memory, list):
            rings = [[layer[name] for name in TENSORS] for layer in memory]
            held = Memory(made.spec, memory[0]["seen"], memory[0]["rewindable"], rings)
            memory = held.state_dict()
        made.load_state_dict(memory)
        return made

    def load(self, state: dict[str, Any]) -> None:
        """Continues from a `state` of the same configuration."""
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, parameter in self.model.named_parameters():
            gradient = state["gradients"].get(name)
            parameter.grad = None if gradient is None else gradient.clone()
        self.memory = self._carried(state["memory"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        torch.set_rng_state(state["rng"])


def _optimizer(model: CompressiveTransformer, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW that decays matrices only, and never the compressor, which starts as a mean."""
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() == 2 and ".compressor." not in name
        if ".relative." in name:  # a row or a matrix per head
            matrix = name.endswith("_weight")
        (decayed if matrix else kept).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)
