"""KVMemory: a bounded key/value memory for streams that may run for ever."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ctx import _C
from ctx.compression import Compressor, make_compressor
from ctx.schedule import Schedule

__all__ = ["STATE", "KVMemory"]

#: Names of the tensors that are a memory, in the order in which operators take them.
STATE = (
    "window_keys",
    "window_values",
    "compressed_keys",
    "compressed_values",
    "sink_keys",
    "sink_values",
    "seen",
)


def state_sizes(
    schedule: Schedule, batch_size: int, kv_heads: int, head_dim: int, value_dim: int, headroom: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of a memory's tensors."""
    window = schedule._law.window_capacity(headroom)
    compressed = schedule._law.compressed_capacity(headroom)
    lengths = (window, compressed, schedule.sinks)
    pairs = [
        (batch_size, kv_heads, length, width)
        for length in lengths
        for width in (head_dim, value_dim)
    ]
    return dict(zip(STATE, [*pairs, (batch_size,)], strict=True))


def bias_values(name: str | Sequence[float] | Tensor, ratio: int) -> Tensor | None:
    """The bias of compressed slots by name, or as numbers per query head; None for no bias."""
    if isinstance(name, Tensor):
        return name.detach()
    if not isinstance(name, str):
        try:
            values = [float(value) for value in name]
        except (TypeError, ValueError):
            raise TypeError(
                f"ctx.KVMemory: compressed_bias must be numbers per query head, got {name!r}"
            ) from None
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"ctx.KVMemory: compressed_bias must be finite, got {values}")
        return torch.tensor(values, dtype=torch.float64)
    if name == "none":
        return None
    if name == "log_ratio":
        return torch.tensor([math.log(ratio)], dtype=torch.float64)
    raise ValueError(
        'ctx.KVMemory: compressed_bias must be "none", "log_ratio" or numbers per query head, '
        f"got {name!r}"
    )


def rotary_width(position: str | None, rotary_dim: int | None, head_dim: int, where: str) -> int:
    """Channels that are rotated: 0 without positions."""
    if position not in ("rotary", None):
        raise ValueError(f'{where}: position must be "rotary" or None, got {position!r}')
    if position is None:
        return 0
    return head_dim if rotary_dim is None else rotary_dim


class KVMemory:
    """Keys and values of B streams: a ring of exact recent pairs, a ring of compressed slots, and
    sinks.

    Keys and values are given un-rotated; keys are rotated once, when written. Everything is
    allocated here; a step allocates its output only, and costs the same at token 10^3 and at token
    10^9. Streaming only: no gradient is recorded (training goes through
    :class:`ctx.CompressiveAttention`). Not safe to call from two threads at once.

    Source: Rae et al. 2019 (arXiv:1911.05507), section 3; see :class:`ctx.Schedule` for where this
    deviates.

    Args:
        schedule: sizes of the memory.
        batch_size: rows B, independent streams.
        kv_heads: key/value heads Hkv.
        head_dim: key width D.
        value_dim: value width Dv; default ``head_dim``.
        compressor: ``"mean"``, ``"max"``, ``"conv"``, ``"gated"`` or a module of
            :mod:`ctx.compression`, whose parameters are used as they are at the time of each call.
        position: ``"rotary"`` or None.
        rotary_base: base of the angles.
        rotary_dim: first channels of each key that are rotated, even; default all.
        rotary_interleaved: pair channels (0, 1), (2, 3), ... instead of (0, D/2), (1, D/2 + 1), ...
        distance: ``"slot"`` (bounded, the paper's) or ``"token"``: how far a slot is from the
            query.
        compressed_bias: added to the scores of compressed slots: ``"none"``, ``"log_ratio"`` (log
            c), or one number per query head.
        scale: factor of the scores; default D^-1/2.
        headroom: tokens that can be written before the first of them attends; longer calls are
            walked in blocks.
        dtype: float32, float64, bfloat16 or float16; arithmetic is float32 (float64 for float64).
        device: where the memory lives.

    Raises:
        ValueError, TypeError: a setting is out of range; the message names it.
    """

    def __init__(
        self,
        schedule: Schedule,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        compressor: str | Compressor = "mean",
        position: str | None = "rotary",
        rotary_base: float = 10000.0,
        rotary_dim: int | None = None,
        rotary_interleaved: bool = False,
        distance: str = "slot",
        compressed_bias: str | Sequence[float] | Tensor = "none",
        scale: float | None = None,
        headroom: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"ctx.KVMemory: schedule must be a ctx.Schedule, got {type(schedule).__name__}"
            )
        if head_dim < 1:
            raise ValueError(f"ctx.KVMemory: head_dim must be at least 1, got {head_dim}")
        value_dim = head_dim if value_dim is None else value_dim
        if value_dim < 1:
            raise ValueError(f"ctx.KVMemory: value_dim must be at least 1, got {value_dim}")
        if scale is not None and not (math.isfinite(scale) and scale != 0):
            raise ValueError(f"ctx.KVMemory: scale must be finite and not zero, got {scale}")
        device = torch.device(device)
        if isinstance(compressor, str):
            compressor = make_compressor(
                compressor,
                kv_heads,
                schedule.ratio,
                head_dim,
                value_dim,
                device=device,
                dtype=torch.float32,
            )
        if not isinstance(compressor, Compressor):
            raise TypeError(
                "ctx.KVMemory: compressor must be a name or a module of ctx.compression, "
                f"got {compressor!r}"
            )
        bias = bias_values(compressed_bias, schedule.ratio)
        self.schedule = schedule
        self.compressor = compressor
        self._native = _C.KVMemory(
            schedule._law,
            batch_size,
            kv_heads,
            head_dim,
            value_dim,
            compressor.name,
            [operand.detach() for operand in compressor.operands()],
            distance,
            rotary_width(position, rotary_dim, head_dim, "ctx.KVMemory"),
            rotary_base,
            rotary_interleaved,
            None
            if bias is None
            else bias.to(device, torch.float64 if dtype == torch.float64 else torch.float32),
            0.0 if scale is None else scale,
            headroom,
            dtype,
            device,
        )

    def step(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Appends T tokens to every row and returns what each query attends to. One operator call.

        Args:
            q: queries [B, H, T, D], un-rotated; H a multiple of Hkv; dtype and device of the
                memory, any strides.
            k: keys [B, Hkv, T, D], un-rotated.
            v: values [B, Hkv, T, Dv].
            lengths: int64 [B], 0 <= length <= T: row b brings its first ``lengths[b]`` tokens;
                default all.

        Returns:
            [B, H, T, Dv], a fresh tensor; zero at tokens past a row's length.

        Raises:
            ValueError, TypeError: an argument does not fit the memory; nothing has been written
                then.
        """
        return self._native.step(q, k, v, lengths)

    def append(self, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> None:
        """The first half of :meth:`step`: appends, evicts and compresses."""
        self._native.append(k, v, lengths)

    def attend(self, q: Tensor) -> Tensor:
        """The second half of :meth:`step`: queries of the last T tokens appended; writes nothing.

        Args:
            q: [B, H, T, D] with T <= headroom and T <= seen of every row.

        Returns:
            [B, H, T, Dv].

        Raises:
            ValueError, TypeError: ``q`` does not fit the memory.
        """
        return self._native.attend(q)

    def reset(self) -> None:
        """Every row begins a new stream."""
        self._native.reset()

    @property
    def seen(self) -> Tensor:
        """Tokens that each row has seen, int64 [B]: the whole bookkeeping. Aliases the memory."""
        return self._native.seen

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are the memory, by name; they alias it."""
        return dict(zip(STATE, self._native.tensors, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors. Constant."""
        return self._native.nbytes

    def __repr__(self) -> str:
        keys = self.tensors["window_keys"]
        return (
            f"KVMemory({self.schedule}, batch_size={keys.shape[0]}, kv_heads={keys.shape[1]}, "
            f"head_dim={keys.shape[3]}, compressor={self.compressor.name!r}, dtype={keys.dtype}, "
            f"device={str(keys.device)!r}, nbytes={self.nbytes})"
        )
