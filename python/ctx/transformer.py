"""A decoder language model over compressive attention (Rae et al. 2019, arXiv:1911.05507)."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctx import _check, generation, interrupted
from ctx.attention import CompressiveAttention, bias_start
from ctx.compression import COMPRESSORS, check_kernel
from ctx.losses import LOSSES
from ctx.model_memory import check_each_its_own, keep, kept
from ctx.padding import check_rows, from_right_padded, mask_of, to_right_padded
from ctx.positions import POSITIONS, Relative
from ctx.schedule import SIZES, Schedule, Sizes, as_sizes, schedules_of

__all__ = ["CompressiveTransformer", "CompressiveTransformerConfig", "ModelMemory"]

# One dict of tensors per layer, first layer first: what `init_memory` returns and `model` carries.
ModelMemory = list[dict[str, Tensor]]

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "memory_content": ("kv", "hidden"),
    "position": POSITIONS,
    "distance": ("slot", "token"),
    "compressed_bias": ("none", "log_ratio", "learned"),
    "compressor_grad": ("task", "aux"),
    "aux_loss": (None, *LOSSES),
    "mlp": ("swiglu", "gelu"),
    "norm": ("rms", "layer"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressiveTransformerConfig:
    """Everything that is needed to build a model again; plain values only, so it goes into a
    checkpoint.

    Args:
        vocab_size: number of different tokens; 256 for bytes.
        embed_dim: width of the residual stream.
        num_layers, num_heads, num_kv_heads: blocks, query heads, key/value heads (None: num_heads).
        window, compressed, ratio, segment, sinks: the memory, as in `ctx.Schedule`; each is one
            int, or a list or tuple of `num_layers` ints, first layer first (kept as a tuple).
            `compressed=0` switches the compressive memory off, be it of one layer.
        compressor ... rotary_interleaved, max_rewind: as in `ctx.CompressiveAttention`.
        mlp: "swiglu" or "gelu".
        mlp_dim: inner width of the MLP; None: 4 x embed_dim, and 2/3 of that for "swiglu".
        norm: "rms" or "layer", applied before each branch.
        tied: the output layer shares the embedding's weights.
        dropout: share of embeddings and of both branches' outputs that is dropped in training.
        bias: every linear layer has one.

    Raises:
        TypeError, ValueError: a setting is of the wrong type or out of range.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    window: Sizes
    compressed: Sizes
    ratio: Sizes
    segment: Sizes | None = None
    sinks: Sizes = 0
    compressor: str = "conv"
    compressor_kernel: int | None = None
    memory_content: str = "kv"
    position: str | None = "rotary"
    relative_dim: int | None = None
    distance: str = "slot"
    compressed_bias: str = "learned"
    compressed_bias_init: float | None = None
    compressor_grad: str = "task"
    aux_loss: str | None = None
    rotary_base: float = 10000.0
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    max_rewind: int = 64
    mlp: str = "swiglu"
    mlp_dim: int | None = None
    norm: str = "rms"
    tied: bool = True
    dropout: float = 0.0
    bias: bool = False

    def __post_init__(self) -> None:
        where = "ctx.CompressiveTransformerConfig"
        optional = (
            "num_kv_heads",
            "mlp_dim",
            "rotary_dim",
            "relative_dim",
            "compressor_kernel",
        )
        for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "max_rewind", *optional):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            whole = _check.integer(value, name, where)
            if whole < 1:
                raise ValueError(f"{where}: {name} must be at least 1, got {whole}")
            object.__setattr__(self, name, whole)  # a plain one: it goes into checkpoints
        for name in ("rotary_interleaved", "tied", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{where}: {name} must be a bool, got {getattr(self, name)!r}")
        for name in ("rotary_base", "dropout"):
            object.__setattr__(self, name, _check.number(getattr(self, name), name, where))
        for name, choices in {"compressor": tuple(COMPRESSORS), **_CHOICES}.items():
            if getattr(self, name) not in choices:
                names = ", ".join(map(repr, choices))
                got = getattr(self, name)
                raise ValueError(f"{where}: {name} must be one of {names}, got {got!r}")
        if self.compressed_bias_init is not None:
            start = bias_start(self.compressed_bias_init, self.compressed_bias, where)
            object.__setattr__(self, "compressed_bias_init", start)
        if not (math.isfinite(self.rotary_base) and self.rotary_base > 0):
            raise ValueError(
                f"{where}: rotary_base must be positive and finite, got {self.rotary_base}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{where}: dropout must be at least 0 and below 1, got {self.dropout}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"{where}: embed_dim must be a multiple of num_heads = {self.num_heads}, "
                f"got {self.embed_dim}"
            )
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(
                f"{where}: num_kv_heads must divide num_heads = {self.num_heads}, "
                f"got {self.num_kv_heads}"
            )
        head_dim = self.embed_dim // self.num_heads
        rotary_dim = head_dim if self.rotary_dim is None else self.rotary_dim
        if self.position == "rotary" and (rotary_dim % 2 or rotary_dim > head_dim):
            raise ValueError(
                f"{where}: rotary_dim must be even and at most embed_dim / num_heads = {head_dim}, "
                f"got {rotary_dim}"
            )
        relative_dim = self.embed_dim if self.relative_dim is None else self.relative_dim
        if self.position == "relative" and relative_dim % 2:
            raise ValueError(f"{where}: relative_dim must be even, got {relative_dim}")
        for name in SIZES:
            sizes = as_sizes(getattr(self, name), name, self.num_layers, where)
            object.__setattr__(self, name, _plain(sizes))
        each = any(isinstance(getattr(self, name), tuple) for name in SIZES)
        self._schedules(self.num_layers if each else 1)  # refuses what is out of range

        for ratio in self.ratio if isinstance(self.ratio, tuple) else (self.ratio,):
            check_kernel(self.compressor, ratio, self.compressor_kernel, where, "compressor_kernel")
        chooses = COMPRESSORS[self.compressor].by_usage
        for name, other in (("aux_loss", None), ("memory_content", "kv")):
            if chooses and getattr(self, name) != other:
                raise ValueError(
                    f"{where}: {name} must be {other!r} for compressor {self.compressor!r}, "
                    f"got {getattr(self, name)!r}"
                )

    def schedules(self) -> tuple[Schedule, ...]:
        """The memory's sizes as the law reads them, one for each layer."""
        return self._schedules(self.num_layers)

    def _schedules(self, layers: int) -> tuple[Schedule, ...]:
        return schedules_of(layers, {name: getattr(self, name) for name in SIZES})

    def schedule(self) -> Schedule:
        """The schedule that all layers have.

        Raises:
            ValueError: they have not all the same; `schedules` has each.
        """
        first, *others = self.schedules()
        if any(other != first for other in others):
            raise ValueError(
                "ctx.CompressiveTransformerConfig.schedule: schedules must be one for all layers, "
                f"got {len({first, *others})} different ones: use schedules()"
            )
        return first

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, sizes per layer as lists; `from_dict` is the way back."""
        values = dataclasses.asdict(self)
        return {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> CompressiveTransformerConfig:
        """Builds the configuration that `to_dict` described.

        Raises:
            ValueError: a name is unknown or missing, or a value out of range.
        """
        fields = dataclasses.fields(cls)
        required = {f.name for f in fields if f.default is dataclasses.MISSING}
        unknown = sorted(set(settings) - {f.name for f in fields})
        missing = sorted(required - set(settings))
        if unknown or missing:
            raise ValueError(
                "ctx.CompressiveTransformerConfig.from_dict: settings must have the names of the "
                f"configuration, got unknown {unknown} and missing {missing}"
            )
        return cls(**settings)

    def attention(self, layer: int) -> dict[str, Any]:
        """The keyword arguments of a layer's `ctx.CompressiveAttention`."""
        elsewhere = ("vocab_size", "num_layers", "mlp", "mlp_dim", "norm", "tied", *SIZES)
        kept = {name: value for name, value in self.to_dict().items() if name not in elsewhere}
        return kept | dict(zip(SIZES, self.schedules()[layer].numbers, strict=True))


def _plain(sizes: Any) -> Any:
    """Sizes with plain ints for what stands for them; what does not is refused by `Schedule`."""
    if isinstance(sizes, tuple):
        return tuple(_plain(size) for size in sizes)
    whole = hasattr(sizes, "__index__") and not isinstance(sizes, (bool, Tensor))
    return operator.index(sizes) if whole else sizes


def _norm(config: CompressiveTransformerConfig) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.embed_dim, eps=1e-6)
    return nn.LayerNorm(config.embed_dim, bias=config.bias)


class _MLP(nn.Module):
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


class _Call(NamedTuple):
    """What a call says to every layer besides its tokens; a block's arguments, in their order."""

    lengths: Tensor | None  # int64 [B]
    reset_at: Tensor | None  # bool [B, T]
    update: bool
    return_aux: bool
    return_region_weights: bool


class _Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: CompressiveTransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = CompressiveAttention(**config.attention(layer))
        self.mlp_norm = _norm(config)
        self.mlp = _MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        memory: dict[str, Tensor] | None,
        lengths: Tensor | None,
        reset_at: Tensor | None,
        update: bool,
        return_aux: bool,
        return_region_weights: bool,
    ) -> tuple[Tensor, dict[str, Tensor] | None, list[Tensor]]:
        """x and the memory after the tokens, and what was asked for besides, loss first."""
        memory = None if memory is None else kept(memory)
        rows = {"lengths": lengths, "reset_at": reset_at}
        y, memory, *asked = self.attention(
            self.attention_norm(x),
            memory,
            **rows,
            update=update,
            return_aux=return_aux,
            return_region_weights=return_region_weights,
        )
        x = x + y  # dropped out by the layer itself
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, memory, asked


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
        self.blocks = nn.ModuleList(_Block(config, layer) for layer in range(config.num_layers))
        self.norm = _norm(config)
        # What is in their place later (an adapter, a shard, a quantised layer) is called alike.
        self.head: nn.Module | None = None
        if not config.tied:
            self.head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.reset_parameters()

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
        return [_attention_of(block, i) for i, block in enumerate(self.blocks)]

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The law that each layer follows."""
        return self.config.schedules()

    @property
    def schedule(self) -> Schedule:
        """The law that every layer follows, where it is one; see `config.schedule`."""
        return self.config.schedule()

    def init_memory(
        self, batch_size: int, *, compressed_dtype: torch.dtype | None = None
    ) -> ModelMemory:
        """An empty memory for `batch_size` streams: one dict of tensors per layer.

        `compressed_dtype`, e.g. `torch.int8`, is what compressed slots are stored as.
        """
        return [
            layer.init_memory(batch_size, compressed_dtype=compressed_dtype)
            for layer in self.layers
        ]

    def forward(
        self,
        tokens: Tensor,  # [B, T]
        memory: Sequence[dict[str, Tensor]] | None = None,
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
                [layers, B, H, T, 3],
                adding up to one, zero at padding, constant.
            last_only: logits of every row's last token only, [B, vocab_size], zero for a row
                without tokens; what generation needs of a long prompt.

        Returns:
            Logits [B, T, vocab_size] for the token after each, zero at padding, and the memory
            after the last: a new one under grad, the one passed (streamed into in place) without,
            and with `update=False`; then the loss with `return_aux`, then the shares with
            `return_region_weights`. Where a call without grad is interrupted (an exception in a
            hook, Ctrl-C), the memory passed is as it was before the call, or refused from then on
            where the rings no longer hold that. Mixed precision of FSDP2 casts the memory to a copy
            before the call: go on with the one returned then.

        Raises:
            TypeError, ValueError, IndexError: before any memory is written.
        """
        where = "ctx.CompressiveTransformer.forward"
        _check.flag(update, "update", where)
        _check.flag(last_only, "last_only", where)
        passed = memory
        if isinstance(memory, (list, tuple)):
            memory = [kept(layer) for layer in memory]
        if return_aux and (self.config.aux_loss is None or reset_at is not None):
            got = "aux_loss=None" if self.config.aux_loss is None else "reset_at"
            raise ValueError(
                f"{where}: return_aux must go with an aux_loss and without reset_at, got {got}"
            )
        self._check(tokens, memory, where, lengths, mask, reset_at)
        if mask is not None:
            tokens, lengths = to_right_padded(tokens, mask)
            if reset_at is not None:
                reset_at, _ = to_right_padded(reset_at, mask)
        if lengths is not None:
            lengths = lengths.clone()  # a layer's own counter would change before the next layer
        call = _Call(lengths, reset_at, update, return_aux, return_region_weights)
        if not update:
            logits, _, *asked = self._call(tokens, memory, call, mask, last_only)
            return (logits, passed, *asked)
        if memory is None or torch.is_grad_enabled():
            return self._call(tokens, memory, call, mask, last_only)
        assert passed is not None
        for given, layer in zip(passed, memory, strict=True):
            keep(given, layer)
        memory = passed
        if torch.compiler.is_compiling():
            return self._call(tokens, memory, call, mask, last_only)
        before = memory[0]["seen"].clone()
        try:
            return self._call(tokens, memory, call, mask, last_only)
        except BaseException:
            interrupted.take_back(memory, before, tokens.shape[1], lengths, reset_at)
            raise

    def _call(
        self,
        tokens: Tensor,
        memory: Sequence[dict[str, Tensor]] | None,
        call: _Call,
        mask: Tensor | None,
        last_only: bool,
    ) -> Any:
        """`forward` of checked arguments, whose padding stands on the right."""
        lengths = call.lengths
        hidden, memory, aux, usage = self._hidden(tokens, memory, call)
        if last_only:
            logits = self._logits(_last(hidden, lengths))[:, 0]
            if not tokens.shape[1]:
                logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool), 0.0)
            elif lengths is not None:
                logits = logits.masked_fill((lengths < 1).unsqueeze(-1), 0.0)
        else:
            logits = self._logits(hidden)
        if mask is not None:
            if not last_only:
                logits = from_right_padded(logits, mask)
            usage = [from_right_padded(u.transpose(1, 2), mask).transpose(1, 2) for u in usage]
        elif lengths is not None and not last_only:
            padding = mask_of(lengths, tokens.shape[1]).logical_not()
            logits = logits.masked_fill(padding.unsqueeze(-1), 0.0)
        asked = [torch.stack(aux).mean()] if call.return_aux else []
        asked += [torch.stack(usage)] if call.return_region_weights else []
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
        was made with; `ctx.rows.resized(memory, model.schedules, twin.schedules)` carries a running
        one over.

        Raises:
            ValueError, TypeError: a size is out of range, or there are not `num_layers` of them.
        """
        sizes = {
            "window": window,
            "compressed": compressed,
            "segment": segment,
            "sinks": sinks,
        }
        changed: dict[str, Any] = {name: n for name, n in sizes.items() if n is not None}
        twin: CompressiveTransformer = _share(self)
        twin.config = dataclasses.replace(self.config, **changed)
        for layer, schedule in zip(twin.layers, twin.schedules, strict=True):
            layer.schedule = schedule
        return twin

    def generate(
        self,
        tokens: Tensor,  # [B, T]
        num_tokens: int,
        *,
        memory: Sequence[dict[str, Tensor]] | None = None,
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
        steps = list(self._stream(tokens, num_tokens, memory, lengths, mask, settings, stop))
        return torch.stack(steps, 1) if steps else tokens.new_empty(tokens.shape[0], 0)

    def stream(
        self,
        tokens: Tensor,  # [B, T]
        num_tokens: int,
        *,
        memory: Sequence[dict[str, Tensor]] | None = None,
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
        return self._stream(tokens, num_tokens, memory, lengths, mask, settings, stop)

    def _stream(
        self,
        tokens: Tensor,
        num_tokens: int,
        memory: Sequence[dict[str, Tensor]] | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        settings: generation.Sampling,
        stop: generation.Stop | None,
    ) -> Iterator[Tensor]:
        where = settings.where
        if memory is not None and _casts_what_is_given(self, where.rpartition(".")[2]):
            raise ValueError(
                f"{where}: memory must not be given to a registered method under mixed precision, "
                "which would stream into copies of another dtype, got one: call the method "
                "without registering it, or set cast_forward_inputs=False"
            )
        held = [kept(layer) for layer in memory] if isinstance(memory, (list, tuple)) else memory
        self._check(tokens, held, where, lengths, mask)
        self._trust_no_more()
        if tokens.shape[1] < 1:
            raise ValueError(
                f"{where}: tokens must be [B, T] with T >= 1, got {list(tokens.shape)}"
            )
        num_tokens = generation.check_count(num_tokens, where)
        stops = generation.as_stop(stop, self.config.vocab_size, where)
        if mask is not None:
            tokens, lengths = to_right_padded(tokens, mask)
        if lengths is not None and tokens.device.type == "cpu" and int(lengths.min()) < 1:
            name = "lengths" if mask is None else "mask"
            row = int(lengths.argmin())
            raise ValueError(
                f"{where}: {name} must leave at least one token, got none in row {row}"
            )
        if memory is None:
            device = tokens.device
            memory = [layer.init_memory(len(tokens), device=device) for layer in self.layers]
        return generation.draw(self, tokens, lengths, num_tokens, memory, settings, stops)

    def _hidden(
        self,
        tokens: Tensor,
        memory: Sequence[dict[str, Tensor]] | None,
        call: _Call,
    ) -> tuple[Tensor, ModelMemory, list[Tensor], list[Tensor]]:
        """What the last block gives, the memory, and of each layer its loss and its shares.

        Layers trust the memory that `_check` has seen for this call only, whatever becomes of it.
        """
        if memory is None or torch.compiler.is_compiling():
            return self._through_blocks(tokens, memory, call)
        try:
            return self._through_blocks(tokens, memory, call)
        finally:
            self._trust_no_more()

    def _trust_no_more(self) -> None:
        """The next call of a layer checks its memory again."""
        for layer in self.layers:
            layer.trust(None)

    def _through_blocks(
        self,
        tokens: Tensor,
        memory: Sequence[dict[str, Tensor]] | None,
        call: _Call,
    ) -> tuple[Tensor, ModelMemory, list[Tensor], list[Tensor]]:
        """:meth:`_hidden` itself."""
        x: Tensor = self.dropout(self.embedding(tokens))
        states: ModelMemory = []
        losses: list[Tensor] = []
        usage: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            held = None if memory is None else memory[i]
            x, state, asked = block(x, held, *call)
            states.append(state)
            if call.return_region_weights:
                usage.append(asked.pop())
            losses += asked
        return x, states, losses, usage

    def _logits(self, hidden: Tensor) -> Tensor:
        hidden = self.norm(hidden)
        logits: Tensor = self.head(hidden) if self.head is not None else self._tied(hidden)
        return logits

    def _tied(self, hidden: Tensor) -> Tensor:
        """Logits by the embedding's vectors of all tokens, [vocab_size, E].

        They are read where the embedding is torch's own layer over a plain tensor. What stands in
        its place otherwise (an adapter, a shard, a quantised layer, one whose weight is brought in
        for the call) is asked by calling it, so that what it adds counts and hooks run.
        """
        embedding = self.embedding
        if type(embedding) is nn.Embedding and "forward" not in vars(embedding):
            weight = embedding.weight
            absent = weight.is_meta and not hidden.is_meta
            # neither DTensor nor quantised
            if not absent and not hasattr(type(weight), "__tensor_flatten__"):
                return F.linear(hidden, weight)
        every = torch.arange(self.config.vocab_size, device=hidden.device)
        return F.linear(hidden, embedding(every))

    def _check(
        self,
        tokens: Tensor,
        memory: Sequence[dict[str, Tensor]] | None,
        where: str,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        reset_at: Tensor | None = None,
    ) -> None:
        """Everything about every layer, before the first is written."""
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{where}: tokens must be a tensor, got {type(tokens).__name__}")
        if tokens.dtype != torch.int64:
            raise TypeError(f"{where}: tokens must be int64, got {tokens.dtype}")
        if tokens.dim() != 2:
            raise ValueError(f"{where}: tokens must be [B, T], got {list(tokens.shape)}")
        if tokens.shape[0] < 1:
            raise ValueError(
                f"{where}: tokens must have at least one row, got B = 0 in {list(tokens.shape)}"
            )
        if memory is not None:
            if not isinstance(memory, (list, tuple)) or len(memory) != len(self.blocks):
                known = isinstance(memory, (list, tuple))
                found = str(len(memory)) if known else type(memory).__name__
                raise ValueError(
                    f"{where}: memory must be a list of {len(self.blocks)} dicts, one per layer, "
                    f"got {found}"
                )
            check_each_its_own(memory, where)
        if torch.compiler.is_compiling():  # the rest reads values, or is not for a graph
            return
        if tokens.device.type == "cpu" and tokens.numel():
            low, high = map(int, tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                got = low if low < 0 else high
                raise IndexError(
                    f"{where}: tokens must be in [0, {self.config.vocab_size}), got {got}"
                )
        device = _device(self)
        if device is not None and device.type != "meta" and tokens.device != device:
            raise ValueError(
                f"{where}: tokens must be on {device} as the parameters, got {tokens.device}"
            )
        rows = (tokens.shape[0], tokens.shape[1], lengths, mask, reset_at)
        check_rows(*rows, where, tokens.device)
        if memory is None:
            return
        interrupted.check(memory, tokens.device, where)
        for i, (layer, state) in enumerate(zip(self.layers, memory, strict=True)):
            name = f"{where}: memory[{i}]"
            layer.check_memory(state, tokens.shape[0], tokens.device, name, "tokens")
        interrupted.check_in_step(memory, tokens.device, where)
        # Not where this is a graph of its own, which has returned before: layers check then.
        for layer, state in zip(self.layers, memory, strict=True):
            layer.trust(state)


def _attention_of(block: nn.Module, index: int) -> CompressiveAttention:
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


def _device(module: nn.Module) -> torch.device | None:
    """Where a module computes, as far as its first parameter or buffer tells.

    A shard does not: it may be kept elsewhere between calls.
    """
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            return None if hasattr(type(tensor), "__tensor_flatten__") else tensor.device
    return None


def _casts_what_is_given(model: Any, method: str) -> bool:
    """Whether `register_fsdp_forward_method` stands around a method, and casts its arguments."""
    if method not in vars(model) or not hasattr(model, "_get_fsdp_state"):
        return False
    policy = getattr(model._get_fsdp_state(), "_mp_policy", None)
    casts = getattr(policy, "cast_forward_inputs", False)
    return bool(casts) and getattr(policy, "param_dtype", None) is not None


def _last(hidden: Tensor, lengths: Tensor | None) -> Tensor:
    """What stands behind the last token of every row, [B, 1, E]; anything where there is none."""
    if not hidden.shape[1]:
        return F.pad(hidden, (0, 0, 0, 1))
    if lengths is None:
        return hidden[:, -1:]
    place = (lengths - 1).clamp_min(0).reshape(-1, 1, 1)
    return hidden.gather(1, place.expand(-1, 1, hidden.shape[2]))


def _share(module: Any, made: dict[nn.Module, Any] | None = None) -> Any:
    """A copy of the module tree that holds the very same parameters and buffers.

    A module that stands in two places of the tree does so in the copy.
    """
    made = {} if made is None else made
    if module not in made:
        # Not copy.copy: a class of FSDP2 cannot be made without the arguments of __init__.
        twin = made[module] = object.__new__(type(module))
        twin.__dict__.update(
            (name, value)
            for name, value in vars(module).items()
            # What was compiled or registered is bound to the original, and would run that.
            if name != "_compiled_call_impl" and getattr(value, "__self__", None) is not module
        )
        twin._modules = {
            name: None if child is None else _share(child, made)
            for name, child in module._modules.items()
        }
    return made[module]
