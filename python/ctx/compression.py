"""Compressors: groups of c pairs become one slot each, per kv head.

``Mean``, ``Max``, ``Conv``, ``Dilated`` and ``MostUsed`` are the compression functions of Rae et
al. 2019 (arXiv:1911.05507, section 3.2). Deviation: the paper compresses hidden states with one
network for all heads, here every kv head compresses its own (un-rotated) keys and values.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ctx import _check
from ctx.finite import groups_apart

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "Conv",
    "Custom",
    "Dilated",
    "Gated",
    "Max",
    "Mean",
    "MostUsed",
    "make_compressor",
    "register",
]


class Compressor(nn.Module):
    """Maps groups of pairs to slots; the base of all compressors.

    A subclass of your own defines ``name`` and :meth:`forward`, and works in training and in
    streams like the built-in ones; :func:`register` makes it available by its name.

    Args:
        kv_heads: key/value heads Hkv, >= 1.
        ratio: tokens per slot c, >= 1.
        head_dim: key width D, >= 1.
        value_dim: value width Dv; default ``head_dim``. 0 where there are no values (a memory of
            layer inputs): then none of the parameters ``value_*`` is made.

    Raises:
        ValueError: a size is below 1.
    """

    name: ClassVar[str]
    #: Whether the engine knows it by name and can compute it from its parameters. Otherwise its
    #: `forward` is called, once for each call; so is that of a subclass which overrides it.
    native: ClassVar[bool] = False
    #: Whether slots are tokens, chosen by the attention that they got.
    by_usage: ClassVar[bool] = False

    def __init__(
        self,
        kv_heads: int,
        ratio: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"kv_heads": kv_heads, "ratio": ratio, "head_dim": head_dim, "value_dim": value_dim}
        where = f"ctx.compression.{type(self).__name__}"
        for name, size in sizes.items():
            least = 0 if name == "value_dim" else 1
            sizes[name] = _check.integer(size, name, where)
            if sizes[name] < least:
                raise ValueError(f"{where}: {name} must be at least {least}, got {size}")
        self.kv_heads, self.ratio, self.head_dim, self.value_dim = sizes.values()
        shapes = self.parameter_shapes()
        self._names = tuple(shapes)
        for name, shape in shapes.items():
            if value_dim == 0 and name.startswith("value_"):
                continue
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            )
        self.reset_parameters()

    @property
    def overlap(self) -> int:
        """Tokens left of a group that :meth:`forward` gets, too; zeros before a stream."""
        return 0

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that this class makes, in the engine's order."""
        return {}

    def reset_parameters(self) -> None:
        """Starts as mean pooling (max, most_used: have nothing to start)."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def operands(self) -> list[Tensor]:
        """The parameters as the engine takes them; none for a compressor that it does not know."""
        if not isinstance(self, Native):
            return []
        if self.value_dim == 0:
            return [self._operand(name, shape) for name, shape in self.parameter_shapes().items()]
        # At every step of a stream: a parameter that is one is not searched for.
        own = self._parameters
        found = [own[name] if name in own else getattr(self, name) for name in self._names]
        return cast(list[Tensor], found)

    def _operand(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self.value_dim > 0 or name.startswith("key_"):
            return cast(Tensor, getattr(self, name))
        # Makes values of width 0: it is only looked at.
        like: Tensor = getattr(self, f"key_{name.removeprefix('value_')}")
        return like if like.shape == shape else like.new_empty(shape)

    @property
    def engine_name(self) -> str:
        """What the engine calls it."""
        return self.name if self.native else "custom"

    @property
    def in_engine(self) -> bool:
        """Whether a stream may hand the parameters to the engine instead of calling the module.

        Not where something acts on the call: hooks (FSDP2 gathers parameters in them), or a
        `forward` that was put on the object, as offloading does. A choice by usage has no call.
        """
        if not self.native or self.by_usage:
            return self.native
        return not (
            self._forward_hooks
            or self._forward_pre_hooks
            or torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or "forward" in self.__dict__
        )

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Compresses groups. The same tokens must give the same slot, whatever stands beside them.

        Args:
            keys: un-rotated keys [B, Hkv, G, overlap + c, D], floating point; the group's own
                tokens are the last c.
            values: values [B, Hkv, G, overlap + c, Dv], dtype and device of ``keys``.

        Returns:
            Key slots [B, Hkv, G, D] and value slots [B, Hkv, G, Dv].

        Raises:
            ValueError: shapes do not belong together.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(keys, values)")

    def slots(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` makes of groups, in their dtype, with its shapes checked.

        Raises:
            ValueError, TypeError: forward did not return two tensors of the documented shapes.
        """
        kept = _check.numbers_of(self)[0] or keys.dtype
        made: Any = groups_apart(self, keys.to(kept), values.to(kept))
        where = f"ctx.compression.{type(self).__name__}"
        if not (isinstance(made, (tuple, list)) and len(made) == 2):
            raise TypeError(f"{where}: forward must return (key slots, value slots), got {made!r}")
        for name, slot, groups in zip(("key", "value"), made, (keys, values), strict=True):
            shape = (*groups.shape[:3], groups.shape[4])
            if slot.shape != shape:
                raise ValueError(f"{where}: {name} slots must be {shape}, got {tuple(slot.shape)}")
        key_slots: Tensor = made[0].to(keys.dtype)
        value_slots: Tensor = made[1].to(values.dtype)
        return key_slots, value_slots

    def extra_repr(self) -> str:
        sizes = ("kv_heads", "ratio", "head_dim", "value_dim")
        return ", ".join(f"{name}={getattr(self, name)}" for name in sizes)


class Native(Compressor):
    """A compressor that the engine computes: one operator for training, one kernel for streams."""

    native = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "native" not in cls.__dict__ and cls.forward is not Native.forward:
            cls.native = False

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Compresses groups; see :meth:`Compressor.forward`."""
        _check.tensors(f"ctx.compression.{type(self).__name__}", keys=keys, values=values)
        slots: tuple[Tensor, Tensor] = torch.ops.ctx.compress(
            keys, values, self.operands(), self.name
        )
        return slots

    def slots(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What the module's call makes of groups; where that is the operator's, it checks."""
        if not self.in_engine:  # a hook or another forward may return anything
            return super().slots(keys, values)
        made: tuple[Tensor, Tensor] = self(keys, values)
        return made


class Custom(Compressor):
    """Any module that maps (keys, values) of groups to (key slots, value slots).

    An integer ``overlap`` of the module says how many tokens left of a group it wants besides. A
    module without one that has a :class:`Compressor` inside (an adapter around it) wants what the
    first of these does.

    Raises:
        TypeError, ValueError: ``overlap`` is no integer, or below 0; or a compressor inside chooses
            by usage, which no other module can take part in.
    """

    name = "custom"

    def __init__(
        self,
        module: nn.Module,
        kv_heads: int,
        ratio: int,
        head_dim: int,
        value_dim: int | None = None,
    ) -> None:
        super().__init__(kv_heads, ratio, head_dim, value_dim)
        inside = [part for part in module.modules() if isinstance(part, Compressor)]
        for part in inside:
            if part.by_usage:
                raise ValueError(
                    "ctx.compression.Custom: module must not contain a compressor that chooses by "
                    f"usage, got {part.name!r} in {type(module).__name__}"
                )
        self._inside = inside[0].overlap if inside else 0
        self.module = module
        if self.overlap < 0:
            raise ValueError(
                f"ctx.compression.Custom: overlap must be at least 0, got {self.overlap}"
            )

    @property
    def overlap(self) -> int:
        """What the module says, else what the first compressor inside it does, else 0."""
        overlap = getattr(self.module, "overlap", self._inside)
        return _check.integer(overlap, "overlap", "ctx.compression.Custom")

    def reset_parameters(self) -> None:
        """Every submodule that knows how to begin does so."""
        for module in self.modules():
            begin = getattr(module, "reset_parameters", None)
            if module is not self and callable(begin):
                begin()

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The module's slots."""
        slots: tuple[Tensor, Tensor] = self.module(keys, values)
        return slots


class Mean(Native):
    """The mean of a group."""

    name = "mean"


class Max(Native):
    """The maximum of a group, channel by channel."""

    name = "max"


class Conv(Native):
    """A strided convolution over tokens, stride c, kernel k >= c: slot = sum_i x_i W_i (+ b).

    The sum goes over the c tokens of the group and the k - c left of it, zeros before the stream.

    Parameters: ``key_weight`` [Hkv, k, D, D] and ``value_weight`` [Hkv, k, Dv, Dv], which start as
    the identity over c for the group's tokens and zero for those left of it, that is as mean
    pooling; with ``bias`` also ``key_bias`` [Hkv, D] and ``value_bias`` [Hkv, Dv].

    Args:
        kernel: k; default ``ratio``.

    Raises:
        ValueError: ``kernel`` is below ``ratio``, or a size below 1.
    """

    name = "conv"

    def __init__(
        self,
        kv_heads: int,
        ratio: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        bias: bool = False,
        kernel: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.has_bias = bias
        self.kernel = ratio = _check.integer(ratio, "ratio", "ctx.compression.Conv")
        if kernel is not None:
            self.kernel = _check.integer(kernel, "kernel", "ctx.compression.Conv")
            if self.kernel < ratio:
                raise ValueError(
                    f"ctx.compression.Conv: kernel must be at least ratio = {ratio}, got {kernel}"
                )
        super().__init__(kv_heads, ratio, head_dim, value_dim, device=device, dtype=dtype)

    @property
    def overlap(self) -> int:
        """k - c."""
        return self.kernel - self.ratio

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "key_weight": (self.kv_heads, self.kernel, self.head_dim, self.head_dim),
            "value_weight": (self.kv_heads, self.kernel, self.value_dim, self.value_dim),
        }
        if self.has_bias:
            shapes["key_bias"] = (self.kv_heads, self.head_dim)
            shapes["value_bias"] = (self.kv_heads, self.value_dim)
        return shapes

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            for name in ("key_weight", "value_weight")[: 2 if self.value_dim else 1]:
                own = self.get_parameter(name)[:, self.overlap :]
                own.diagonal(dim1=-2, dim2=-1).fill_(1.0 / self.ratio)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel={self.kernel}"


class Dilated(Native):
    """Dilated convolutions over tokens, then a strided one.

    L = max(1, ceil(log2 c)) layers h_t = ReLU(h_(t - 2^l) W_0 + h_t W_1), l = 0 ... L - 1, and
    slot = sum_i h_i W_i over the group, which so depends on 2^L - 1 tokens left of it, too. There
    are no biases: before the stream all is zero. The paper does not say how deep or wide its
    dilated convolutions are; here h has 2 D channels, so that they can start as mean pooling.

    Parameters: ``key_first`` [Hkv, 2, D, 2 D], ``key_hidden`` [Hkv, L - 1, 2, 2 D, 2 D] unless L
    is 1, ``key_weight`` [Hkv, c, 2 D, D], and ``value_first``, ``value_hidden``, ``value_weight``
    with Dv.
    """

    name = "dilated"

    @property
    def layers(self) -> int:
        """L."""
        return max(1, (self.ratio - 1).bit_length())

    @property
    def overlap(self) -> int:
        """2^L - 1."""
        return (1 << self.layers) - 1

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, width in (("key", self.head_dim), ("value", self.value_dim)):
            shapes[f"{name}_first"] = (self.kv_heads, 2, width, 2 * width)
            if self.layers > 1:  # DDP has no use for a parameter without elements
                shapes[f"{name}_hidden"] = (self.kv_heads, self.layers - 1, 2, 2 * width, 2 * width)
            shapes[f"{name}_weight"] = (self.kv_heads, self.ratio, 2 * width, width)
        return shapes

    def operands(self) -> list[Tensor]:
        """The parameters as the engine takes them, which wants the layers even where it is none."""
        operands = super().operands()
        if self.layers > 1:
            return operands
        key_first, key_weight, value_first, value_weight = operands
        none = [
            first.new_empty(self.kv_heads, 0, 2, first.shape[3], first.shape[3])
            for first in (key_first, value_first)
        ]
        return [key_first, none[0], key_weight, value_first, none[1], value_weight]

    def reset_parameters(self) -> None:
        """The later of two tokens passes through, as itself and its negative (ReLU loses neither),
        and the strided convolution takes the mean.
        """
        super().reset_parameters()
        with torch.no_grad():
            for name, width in (("key", self.head_dim), ("value", self.value_dim)):
                if width == 0:
                    continue
                first = self.get_parameter(f"{name}_first")[:, 1]
                first[..., :width].diagonal(dim1=-2, dim2=-1).fill_(1.0)
                first[..., width:].diagonal(dim1=-2, dim2=-1).fill_(-1.0)
                if self.layers > 1:
                    hidden = self.get_parameter(f"{name}_hidden")[:, :, 1]
                    hidden.diagonal(dim1=-2, dim2=-1).fill_(1.0)
                last = self.get_parameter(f"{name}_weight")
                last[..., :width, :].diagonal(dim1=-2, dim2=-1).fill_(1.0 / self.ratio)
                last[..., width:, :].diagonal(dim1=-2, dim2=-1).fill_(-1.0 / self.ratio)


class Gated(Native):
    """Softmax-weighted pooling: slot = sum_i softmax_i(key_i . u + p_i) x_i, one gate for keys and
    one for values.

    Both gates read the keys. Parameters: ``key_gate`` and ``value_gate`` [Hkv, D] (u),
    ``key_position`` and ``value_position`` [Hkv, c] (p); they start at zero, that is as mean
    pooling. Not in the paper.
    """

    name = "gated"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "key_gate": (self.kv_heads, self.head_dim),
            "key_position": (self.kv_heads, self.ratio),
            "value_gate": (self.kv_heads, self.head_dim),
            "value_position": (self.kv_heads, self.ratio),
        }


class MostUsed(Native):
    """Of the c k tokens that leave the window at one boundary the k most used, as they are.

    Usage of a token is the attention that it got from all queries since it was written, averaged
    over the query heads of its kv head; of equals the earlier token stays, and slots are in the
    order of their tokens. Under the distance "token" they keep their own positions. The choice has
    no gradient, the chosen pairs do.

    A memory counts usage, so tokens come with their queries (no ``append``), and cannot be taken
    back (no ``rewind``). Nothing can be trained: there is no auxiliary loss.
    """

    name = "most_used"
    native = True
    by_usage = True

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs alone do not say what to keep.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "ctx.compression.MostUsed: forward must not be called: what stays depends on queries"
        )

    @staticmethod
    def take(groups: Tensor, chosen: Tensor) -> Tensor:
        """The slots of groups [B, Hkv, G, c, D] that `torch.ops.ctx.choose_` chose, int64
        [B, Hkv, G]."""
        index = chosen.unsqueeze(-1).expand(-1, -1, -1, groups.shape[4])
        return groups.flatten(2, 3).gather(2, index)


COMPRESSORS: dict[str, type[Compressor]] = {
    kind.name: kind for kind in (Mean, Max, Conv, Dilated, Gated, MostUsed)
}


def register(kind: type[Compressor]) -> type[Compressor]:
    """Makes a subclass of :class:`Compressor` available by its name; a class decorator.

    Its constructor must take what :class:`Compressor`'s takes. A class of the same module and
    qualified name (a notebook's cell that runs again) takes the earlier one's place.

    Raises:
        TypeError: ``kind`` is not such a class.
        ValueError: the name is taken.
    """
    if not (isinstance(kind, type) and issubclass(kind, Compressor)):
        raise TypeError(f"ctx.compression.register: kind must be a Compressor class, got {kind!r}")
    held = COMPRESSORS.get(kind.name, kind)
    again = (held.__module__, held.__qualname__) == (kind.__module__, kind.__qualname__)
    if not again or kind.name == "custom":
        raise ValueError(f"ctx.compression.register: name must be a new one, got {kind.name!r}")
    COMPRESSORS[kind.name] = kind
    return kind


def as_compressor(
    module: nn.Module, kv_heads: int, ratio: int, head_dim: int, value_dim: int
) -> Compressor:
    """A compressor as it is, any other module wrapped.

    Raises:
        ValueError, TypeError: it has another ratio, or is one that cannot be called; see also
            :class:`Custom`.
    """
    if isinstance(module, Compressor):
        if module.by_usage and not module.native:
            raise ValueError(
                f"ctx.compression.{type(module).__name__}: forward must not be overridden where "
                f"slots are chosen by usage, got a subclass of {module.name!r} that does"
            )
        if module.ratio != ratio:  # a longer kernel of conv would pass for one with an overlap
            raise ValueError(
                f"ctx.compression.{type(module).__name__}: ratio must be {ratio} as the "
                f"schedule's, got {module.ratio}"
            )
        return module
    return Custom(module, kv_heads, ratio, head_dim, value_dim)


def make_compressor(
    name: str,
    kv_heads: int,
    ratio: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    kernel: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Compressor:
    """A compressor by name.

    Args:
        kernel: of "conv", which alone has one; default ``ratio``.

    Raises:
        ValueError: no compressor has that name, or it cannot have that kernel.
    """
    if name not in COMPRESSORS:
        known = ", ".join(COMPRESSORS)
        raise ValueError(f"ctx.compression: compressor must be one of {known}, got {name!r}")
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    if kernel is not None:
        made["kernel"] = check_kernel(name, ratio, kernel, "ctx.compression", "kernel")
    return COMPRESSORS[name](kv_heads, ratio, head_dim, value_dim, **made)


def check_kernel(name: str, ratio: int, kernel: int | None, where: str, called: str) -> int | None:
    """The kernel as an int, which the compressor must be able to have; None: its own.

    Raises:
        ValueError, TypeError: it cannot.
    """
    if kernel is None:
        return None
    if name != Conv.name:
        raise ValueError(f'{where}: {called} must be None unless "conv" compresses, got {kernel}')
    whole = _check.integer(kernel, called, where)
    if whole < ratio:
        raise ValueError(f"{where}: {called} must be at least ratio = {ratio}, got {kernel}")
    return whole
