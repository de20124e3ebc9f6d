"""What an attention layer over a compressive memory is made of: settings, parameters, constants,
and the specification of its memories. How it computes a call is in ctx.attention.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from ctx import _check, attention_inputs, memory_check
from ctx.compression import Compressor, as_compressor
from ctx.compression.registry import compressor_of
from ctx.constants import log_ratio, slopes_of
from ctx.engine import Law, Scores, law_of
from ctx.finite import apart
from ctx.layer_options import check_by_usage
from ctx.losses import Decoder
from ctx.memory import Memory
from ctx.positions import Relative
from ctx.schedule import Schedule
from ctx.settings import AttentionSettings
from ctx.spec import Spec, layer_spec
from ctx.state import StateShape, empty_clock, slot_dtypes

__all__ = ["AttentionParts"]

_WHERE = "ctx.CompressiveAttention"
#: Fields of AttentionSettings that are attributes of a layer by the same names.
_SETTINGS = tuple(
    field.name
    for field in dataclasses.fields(AttentionSettings)
    if field.name not in ("schedule", "keys", "compressed_bias")
)
#: Attributes that a memory's specification is made of, besides the compressor.
_SPECIFYING = frozenset(("_schedule", "max_rewind", "memory_content", *_SETTINGS))


class AttentionParts(nn.Module):
    """The base of :class:`ctx.CompressiveAttention`, which documents the settings."""

    spec: Spec
    position: str | None
    distance: str
    memory_content: str
    compressor_grad: str
    aux_loss: str | None
    rotary_dim: int
    rotary_base: float
    rotary_interleaved: bool
    compressed_bias_init: float | None
    dropout: float
    max_rewind: int
    scale: float
    inv_freq: tuple[float, ...] | None
    attention_factor: float
    slot_mass: bool
    logit_softcap: float | None
    law: Law  # what operators that attend, or make slots, take
    custom_law: Law  # the same, where the slots are given
    stored_law: Law  # what is stored: inputs are not rotated
    state_shape: StateShape  # of a memory's tensors
    plan_key: tuple[int, ...]  # what a plan depends on
    counts_attention: bool  # whether slots are chosen by the attention that tokens received

    def _set(self, schedule: Schedule, options: dict[str, Any], made: dict[str, Any]) -> None:
        """Attributes and parameters, from options that have been checked."""
        embed_dim, num_heads = options["embed_dim"], options["num_heads"]
        kv_heads = num_heads if options["num_kv_heads"] is None else options["num_kv_heads"]
        head_dim = embed_dim // num_heads
        self._schedule = schedule
        self.embed_dim, self.head_dim = embed_dim, head_dim
        self.num_heads, self.num_kv_heads = num_heads, kv_heads
        others = ("compressor_grad", "aux_loss", "compressed_bias_init", "dropout", "max_rewind")
        for name in (*_SETTINGS, *others, "memory_content"):
            setattr(self, name, options[name])
        self.scale = head_dim**-0.5 if options["scale"] is None else options["scale"]
        width = head_dim if options["rotary_dim"] is None else options["rotary_dim"]
        self.rotary_dim = width if self.position == "rotary" else 0
        #: What is remembered of a token: heads, key width, value width.
        hidden = self.memory_content == "hidden"
        self._stored = (1, embed_dim, 0) if hidden else (kv_heads, head_dim, head_dim)
        bias = options["bias"]
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias, **made)
        self.k_proj = nn.Linear(embed_dim, kv_heads * head_dim, bias=bias, **made)
        self.v_proj = nn.Linear(embed_dim, kv_heads * head_dim, bias=bias, **made)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias, **made)
        self._bias_kind = options["compressed_bias"]
        heads, *widths = self._stored
        sizes = (heads, schedule.ratio, *widths)
        kernel = options["compressor_kernel"]
        self.compressor: Compressor = compressor_of(
            options["compressor"], _WHERE, *sizes, kernel=kernel, **made
        )
        if self.aux_loss == "autoencoding":
            self.decoder = Decoder(*sizes, **made)
        if self._bias_kind == "learned":
            self.register_parameter("compressed_bias", nn.Parameter(torch.empty(num_heads, **made)))
        self.relative: Relative | None = None
        if self.position == "relative":
            given = options["relative_dim"]
            sinusoids = embed_dim if given is None else given
            self.relative = Relative(num_heads, head_dim, sinusoids, **made)
        self._reset_compression()

    def reset_parameters(self) -> None:
        """First values of everything, also of what was made on the meta device."""
        for child in self.children():
            whole = isinstance(child, Compressor)  # which sees to what it owns
            for module in [child] if whole else reversed([*child.modules()]):
                begin = getattr(module, "reset_parameters", None)
                if callable(begin):
                    begin()
        self._reset_compression()

    def __setattr__(self, name: str, value: Any) -> None:
        """As a module does; a compressor is made one, and what follows from settings follows."""
        if name != "compressor":
            super().__setattr__(name, value)
            if name in _SPECIFYING and "spec" in self.__dict__:
                self._specify()
            return
        if not isinstance(value, nn.Module):
            raise TypeError(f"{_WHERE}: compressor must be a module, got {value!r}")
        compressor = as_compressor(value, self._stored[0], self.schedule.ratio, *self._stored[1:])
        if compressor.by_usage:
            check_by_usage(vars(self), _WHERE)
        super().__setattr__(name, compressor)
        self._specify()

    def _specify(self) -> None:
        """What follows from settings and compressor: the specification of the layer's memories, the
        shapes of their tensors, and the law of what a query sees and of what is stored.
        """
        compressor, settings = self.compressor, self.settings.resolved(self.head_dim)
        hidden = self.memory_content == "hidden"
        made = layer_spec(
            settings, compressor, self._stored, self.max_rewind, content=self.memory_content
        )
        self.__dict__["spec"] = Spec((made,))
        self.state_shape = StateShape.measured(memory_check.shapes(self.spec)[0])
        sizes = (self.head_dim, compressor.overlap)
        self.law = law_of(settings, compressor.engine_name, *sizes)
        self.custom_law = self.stored_law = law_of(settings, "custom", *sizes)
        if hidden:
            plain = dataclasses.replace(settings, rotary_dim=0, inv_freq=(), attention_factor=1.0)
            self.stored_law = law_of(plain, "custom", *sizes)
        self.plan_key = self.law.settings[:6]
        self.counts_attention = compressor.by_usage

    def _reset_compression(self) -> None:
        if self._bias_kind == "learned":
            with torch.no_grad():
                ratio, start = self.schedule.ratio, self.compressed_bias_init
                usual = 0.0 if self.slot_mass else math.log(ratio)
                first = usual if start is None else start
                self.get_parameter("compressed_bias").fill_(first)

    @property
    def compressed_bias(self) -> Tensor | None:
        """What is added to the scores of compressed slots, [H]: a parameter where it is learned,
        the constant log ratio in the module's dtype, or None.

        A constant is made of the settings when it is asked for, and is no part of the state.
        """
        if self._bias_kind == "learned":
            try:
                return self._parameters["compressed_bias"]
            except KeyError:
                raise AttributeError("compressed_bias") from None
        return _copied(self._bias_on(self._place()[1]))

    @property
    def alibi_slopes(self) -> Tensor | None:
        """Slopes of ``position="alibi"``, [H] in the module's dtype, else None; a constant that is
        made of the settings when it is asked for.
        """
        return _copied(self._slopes_on(self._place()[1]))

    def _bias_on(self, device: torch.device) -> Tensor | None:
        if self._bias_kind == "learned":
            return self.compressed_bias
        if self._bias_kind == "none":
            return None
        return log_ratio(self.schedule.ratio, self.num_heads, self._place()[0], device)

    def _slopes_on(self, device: torch.device) -> Tensor | None:
        if self.position != "alibi":
            return None
        return slopes_of(self.num_heads, self._place()[0], device)

    def _place(self) -> tuple[torch.dtype, torch.device]:
        """The dtype and device of the module's numbers: of keys, else of whatever it has, else
        torch's own. Where parameters are brought in for each call, the device that they go to.
        """
        dtype, device = _check.numbers_of(self.k_proj, self)
        if device is None or device.type == "meta":
            device = attention_inputs.execution_device(self.k_proj, self) or device
        return dtype or torch.get_default_dtype(), device or torch.get_default_device()

    @property
    def schedule(self) -> Schedule:
        """Sizes of the memory. Another of the same ratio may be assigned, e.g. to evaluate without
        compressed slots; a memory belongs to the schedule that it was made with.
        """
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        self._schedule = schedule

    @property
    def settings(self) -> AttentionSettings:
        """What attention to the memory is, as one value."""
        own = {name: getattr(self, name) for name in _SETTINGS}
        return AttentionSettings(schedule=self.schedule, compressed_bias=self._bias_kind, **own)

    def init_memory(
        self,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        compressed_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Memory:
        """An empty memory for ``batch_size`` streams, a :class:`ctx.Memory` of one layer.

        With ``memory_content="hidden"`` the inputs stand where keys do, [B, 1, capacity, E], and
        values have width 0.

        Args:
            batch_size: rows B.
            dtype: of pairs; default that of the parameters.
            compressed_dtype: of compressed slots, as in :class:`ctx.KVMemory`; default ``dtype``.
            device: default that of the parameters.

        Raises:
            ValueError, TypeError: ``batch_size`` is below 1, or a dtype is none that can be.
        """
        where = f"{_WHERE}.init_memory"
        batch_size = _check.integer(batch_size, "batch_size", where, 1)
        if dtype is not None and not _check.dtype(dtype, where).is_floating_point:
            raise TypeError(f"{where}: dtype must be floating point, got {dtype}")
        if device is not None:
            device = _check.device(device, where)
        own = self._place()
        dtype, device = dtype or own[0], device or own[1]
        if compressed_dtype is not None:
            allowed = slot_dtypes(dtype)
            if _check.dtype(compressed_dtype, where, "compressed_dtype") not in allowed:
                names = ", ".join(map(str, allowed))
                raise TypeError(
                    f"{where}: compressed_dtype must be one of {names}, got {compressed_dtype}"
                )
        rings = self.state_shape.zeros(batch_size, dtype, device, compressed_dtype)
        return Memory(self.spec, *empty_clock(batch_size, device), [rings])

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        """[B, T, heads D] as [B, heads, T, D]."""
        batch, tokens, _ = x.shape
        if tokens == 1 and not torch.compiler.is_compiling():  # a step of a stream: one view
            return x.reshape(batch, heads, 1, self.head_dim)
        return x.reshape(batch, tokens, heads, self.head_dim).transpose(1, 2)

    def _joined(self, x: Tensor) -> Tensor:
        """[B, heads, T, D] as [B, T, heads D]."""
        if x.shape[2] == 1 and not torch.compiler.is_compiling():
            return x.reshape(x.shape[0], 1, -1)
        return x.transpose(1, 2).flatten(2)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Remembered inputs [B, 1, n, E] to un-rotated keys and values [B, Hkv, n, D]."""
        return self._projected(x[:, 0])

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [B, n, E] to un-rotated keys and values [B, Hkv, n, D]."""
        k, v = apart(x, self.k_proj, self.v_proj)
        return self._heads(k, self.num_kv_heads), self._heads(v, self.num_kv_heads)

    def constant_pairs(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """:meth:`pairs` of inputs of any dtype, by constant weights."""
        made = []
        for projection in (self.k_proj, self.v_proj):
            rows = x[:, 0].to(dtype)
            weights = {name: w.detach() for name, w in projection.named_parameters()}
            if any(w.is_meta for w in weights.values()) and not rows.is_meta:
                y = projection(rows)  # weights that are brought in for the call are not trained
            else:
                y = torch.func.functional_call(projection, weights, (rows,))
            made.append(self._heads(y, self.num_kv_heads).to(x.dtype))
        return made[0], made[1]

    def scores(self, device: torch.device) -> Scores:
        """What scores are made of besides queries and keys; constants on that device."""
        relative = [] if self.relative is None else [*self.relative()]
        bias, slopes = self._bias_on(device), self._slopes_on(device)
        return Scores(bias, slopes, relative)

    def _nothing(self, like: Tensor) -> Tensor:
        """Zero, as a sum over no number of every parameter: gives each a gradient of zeros where a
        call has no token, as data-parallel training expects of every call.
        """
        none = [p.flatten()[:0].to(like.dtype).sum() for p in self.parameters() if p.requires_grad]
        return sum(none, start=like.new_zeros(()))

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"{self.schedule}, "
            f"position={self.position!r}, distance={self.distance!r}"
        )


def _copied(constant: Tensor | None) -> Tensor | None:
    """A constant that the caller may write to: the one that layers compute with is shared."""
    return None if constant is None else constant.clone()
