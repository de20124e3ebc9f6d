"""A decoder language model over compressive attention (Rae et al. 2019, arXiv:1911.05507)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ctx import _check, attention_inputs, engine, generation, memory_check, transformer_inputs
from ctx.attention import CompressiveAttention
from ctx.memory import Memory
from ctx.memory_check import widened
from ctx.module_share import share
from ctx.padding import moved, weights_moved_back
from ctx.positions import Relative
from ctx.schedule import Schedule, Sizes
from ctx.spec import Spec
from ctx.transformer_blocks import Block, attention_of, make_norm
from ctx.transformer_config import CompressiveTransformerConfig
from ctx.transformer_logits import logits_of

__all__ = ["CompressiveTransformer", "CompressiveTransformerConfig"]


class CompressiveTransformer(nn.Module):
    """A language model whose memory has a constant size, however long the stream.

    Under grad every call is differentiable and returns a new memory, which is constant for the next
    call (truncated back-propagation); under `torch.no_grad()` or `torch.inference_mode()` the
    memory is streamed into in place. Both give the same logits, however the stream is cut into
    calls.

    Args:
        config: sizes and choices; kept as `model.config`.
    """

    def __init__(self, config: CompressiveTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config)
        # What is in their place later (an adapter, a shard, a quantised layer) is called alike.
        self._spec: Spec | None = None
        self.head: nn.Module | None = None
        if not config.tied:
            self.head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.reset_parameters()
        _ = self.spec  # made here, so that a first call may be a compiled one

    def reset_parameters(self) -> None:
        """Normal weights; branches that write to the residual stream start smaller (GPT-2)."""
        std = 0.02
        branch = std / math.sqrt(2 * self.config.num_layers)
        for layer in self.layers:
            layer.reset_parameters()
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                inner = {"out_proj", "down"} & set(name.split("."))  # also inside of a wrapper
                nn.init.normal_(module.weight, std=branch if inner else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Relative):
                module.reset_parameters(std)
            elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)

    @property
    def layers(self) -> list[CompressiveAttention]:
        """The attention of every block, first block first; also inside of what wraps it."""
        return [attention_of(block, i) for i, block in enumerate(self.blocks)]

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The law that each layer follows."""
        return self.config.schedules()

    @property
    def schedule(self) -> Schedule:
        """The law that every layer follows, where it is one; see `config.schedule`."""
        return self.config.schedule()

    @property
    def spec(self) -> Spec:
        """What the model's memories are made with; see :class:`ctx.Memory`."""
        layers = tuple(layer.spec.layers[0] for layer in self.layers)
        if self._spec is None or self._spec.layers != layers:
            self._spec = Spec(layers)
        return self._spec

    def init_memory(
        self, batch_size: int, *, compressed_dtype: torch.dtype | None = None
    ) -> Memory:
        """An empty memory for `batch_size` streams, a :class:`ctx.Memory` of all layers.

        `compressed_dtype`, e.g. `torch.int8`, is what compressed slots are stored as.
        """
        made = [
            layer.init_memory(batch_size, compressed_dtype=compressed_dtype)
            for layer in self.layers
        ]
        return Memory(self.spec, *made[0].clock, [one.rings[0] for one in made])

    def forward(
        self,
        tokens: Tensor,  # [B, T]
        memory: Memory | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset_at: Tensor | None = None,
        update: bool = True,
        return_aux: bool = False,
        return_region_weights: bool = False,
        last_only: bool = False,
    ) -> Any:
        """Continues every row's stream by T tokens.

        Args:
            tokens: int64 [B, T], each in [0, vocab_size).
            memory: what `init_memory` or an earlier call returned; None: an empty memory.
            lengths: int64 [B]: row b is its first `lengths[b]` tokens, the rest is padding.
            mask: bool [B, T], true at tokens: as `lengths`, for padding on the left or anywhere.
            reset_at: bool [B, T], true where a token is the first of a new stream (a document of a
                packed batch), which sees nothing of what its row held before.
            update: False reads the memory and does not write it: the logits are the same, and the
                memory returned is the one passed, bit for bit as it was (None stays None). For
                scoring candidates, bootstrapping a value, or validating over a training memory.
            return_aux: also return the auxiliary loss that `config.aux_loss` names, the mean over
                layers; not together with `reset_at`.
            return_region_weights: also return the share of its attention that every query gives to
                sinks, compressed slots and window in every layer, for inspection:
                [layers, B, H, T, 3], adding up to one, zero at padding, constant.
            last_only: logits of every row's last token only, [B, vocab_size], zero for a row
                without tokens; what generation needs of a long prompt.

        Returns:
            Logits [B, T, vocab_size] for the token after each, zero at padding, and the memory
            after the last: a new one under grad, the one passed (streamed into in place) without,
            and with `update=False`; then the loss with `return_aux`, then the shares with
            `return_region_weights`. Where a call without grad is interrupted (an exception in a
            hook, Ctrl-C), the memory passed is as it was before the call, or refused from then on
            where the rings no longer hold that. Where a wrapper of a block copies what the block is
            given, the memory returned is another one: go on with that.

        Raises:
            TypeError, ValueError, IndexError: before any memory is written.
        """
        where = "ctx.CompressiveTransformer.forward"
        _check.flag(update, "update", where)
        _check.flag(last_only, "last_only", where)
        if return_aux:
            attention_inputs.check_auxiliary(self.config.aux_loss, reset_at, where)
        passed, layers = memory, self.layers
        memory = widened(memory)
        transformer_inputs.check(self, tokens, memory, where, lengths, mask, reset_at)
        tokens, lengths, reset_at = moved(tokens, mask, lengths, reset_at)
        plans = engine.plans(layers, memory, tokens, lengths, reset_at, update)
        plan = plans[layers[0].plan_key]
        memory = memory_check.written(passed, memory, plan.in_place)
        x: Tensor = self.dropout(self.embedding(tokens))
        if plan.in_place:
            engine.begin(plan)
        rings: list[list[Tensor]] = []
        losses: list[Tensor] = []
        weights: list[Tensor] = []
        for i, (block, layer) in enumerate(zip(self.blocks, layers, strict=True)):
            held = None if memory is None else memory[i]
            x, state, asked = block(
                x, held, plans[layer.plan_key], update, return_aux, return_region_weights
            )
            if update:
                rings.append(state.rings[0])
            if return_region_weights:
                weights.append(asked.pop())
            losses += asked
        logits = logits_of(self, x, plan.lengths, mask, last_only)
        weights = [weights_moved_back(w, mask) for w in weights]
        if not update:
            memory = passed
        elif not plan.in_place:
            memory = Memory(self.spec, *engine.ends(plan), rings)
        elif memory is not None:
            engine.advance(plan)
            # A wrapper that moves or casts a block's inputs copies them; the copies were written.
            if any(mine is not made for mine, made in zip(memory.rings, rings, strict=True)):
                memory = Memory(memory.spec, *plan.clock, rings)
        asked = [torch.stack(losses).mean()] if return_aux else []
        asked += [torch.stack(weights)] if return_region_weights else []
        return (logits, memory, *asked)

    def with_memory(
        self,
        *,
        window: Sizes | None = None,
        compressed: Sizes | None = None,
        segment: Sizes | None = None,
        sinks: Sizes | None = None,
    ) -> CompressiveTransformer:
        """The same model over a memory of other sizes: a second module that shares every parameter.

        Sizes are one int or one for each layer; those that are not given stay as they are, and
        `compressed=0` switches the compressive memory off. A memory belongs to the sizes that it
        was made with; `memory.resized(twin.schedules)` carries a running one over.

        Raises:
            ValueError, TypeError: a size is out of range, or there are not `num_layers` of them.
        """
        sizes = {"window": window, "compressed": compressed, "segment": segment, "sinks": sinks}
        changed: dict[str, Any] = {name: n for name, n in sizes.items() if n is not None}
        twin: CompressiveTransformer = share(self)
        twin.config = dataclasses.replace(self.config, **changed)
        for layer, schedule in zip(twin.layers, twin.schedules, strict=True):
            layer.schedule = schedule
        _ = twin.spec
        return twin

    def generate(
        self,
        tokens: Tensor,  # [B, T]
        num_tokens: int,
        *,
        memory: Memory | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: generation.Stop | None = None,
    ) -> Tensor:
        """Continues every row by `num_tokens` sampled tokens, at constant memory.

        The model is called as a module, without grad, so that hooks run and FSDP2 works. Where
        several processes hold shards of one model, each must make as many calls: prompts of one
        width, the same `num_tokens`, and no `stop`.

        Args:
            tokens: int64 [B, T], T >= 1: the prompt, or what comes next in `memory`'s streams.
            memory: streamed into in place; afterwards it holds all but the newest token, so
                `generate(out[:, -1:], n, memory=memory)` goes on. None: starts empty.
            num_tokens: at least 0; with 0 the prompt is read into `memory`, whole.
            lengths: int64 [B], each at least 1: prompts of unequal length, padded on the right.
            mask: bool [B, T], true at tokens: as `lengths`, for padding on the left or anywhere.
            temperature: 0 takes the likeliest token; 1 samples from the model's distribution.
            top_k: only the k likeliest tokens can be drawn.
            top_p: only the fewest likeliest tokens whose probabilities reach p can be drawn.
            seed: of a private generator; None: torch's global one.
            stop: a token, several, or a callable that is given the drawn tokens, int64 [B], and
                returns bool [B], true for rows that are to end with it. A row that has ended
                repeats its last token, and its memory takes no more; when all have, so has the
                result. Waits for the device at every step.

        Returns:
            int64 [B, num_tokens], without the prompt; fewer columns where every row has stopped.

        Raises:
            TypeError, ValueError, IndexError: before any memory is written.
        """
        where = "ctx.CompressiveTransformer.generate"
        settings = generation.Sampling(temperature, top_k, top_p, seed, where=where)
        drawn = generation.start(self, tokens, num_tokens, memory, lengths, mask, settings, stop)
        steps = list(drawn)
        return torch.stack(steps, 1) if steps else tokens.new_empty(tokens.shape[0], 0)

    def stream(
        self,
        tokens: Tensor,  # [B, T]
        num_tokens: int,
        *,
        memory: Memory | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: generation.Stop | None = None,
    ) -> Iterator[Tensor]:
        """`generate`, one step at a time: yields int64 [B] as soon as it is drawn."""
        where = "ctx.CompressiveTransformer.stream"
        settings = generation.Sampling(temperature, top_k, top_p, seed, where=where)
        return generation.start(self, tokens, num_tokens, memory, lengths, mask, settings, stop)
