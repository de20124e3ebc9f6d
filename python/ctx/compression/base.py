"""What all compressors share, and what those share that the engine computes."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ctx import _C, _check
from ctx.finite import groups_apart

__all__ = ["Compressor", "Native"]


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
        where = f"ctx.compression.{type(self).__name__}"
        self.kv_heads, self.ratio, self.head_dim = _check.integers(
            where, 1, kv_heads=kv_heads, ratio=ratio, head_dim=head_dim
        )
        self.value_dim = _check.integer(value_dim, "value_dim", where, 0)
        self._left_out: dict[str, tuple[int, ...]] = {}
        shapes = self.parameter_shapes()
        self._names = tuple(shapes)
        for name, shape in shapes.items():
            if self._leaves_out(name, shape):
                self._left_out[name] = shape
            else:
                made = torch.empty(shape, device=device, dtype=dtype)
                self.register_parameter(name, nn.Parameter(made))
        self.reset_parameters()

    @property
    def overlap(self) -> int:
        """Tokens left of a group that :meth:`forward` gets, too; zeros before a stream."""
        return 0

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that this class makes, in the engine's order."""
        return {}

    def reset_parameters(self) -> None:
        """First values of the parameters: zeros, unless a subclass says otherwise."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def _leaves_out(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a parameter is not made."""
        return self.value_dim == 0 and name.startswith("value_")

    def operands(self) -> list[Tensor]:
        """The parameters as the engine takes them; none for a compressor that it does not know."""
        return []

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
            Key slots [B, Hkv, G, D] and value slots [B, Hkv, G, Dv]; a class of your own may add
            their log-mass [B, Hkv, G], used with ``slot_mass`` (:class:`ctx.AttentionSettings`).

        Raises:
            ValueError: shapes do not belong together.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(keys, values)")

    def mass(self, keys: Tensor) -> Tensor:
        """Log-mass of the slots of groups, [B, Hkv, G]: log c, where :meth:`forward` gives none."""
        return keys.new_full(keys.shape[:3], math.log(self.ratio))

    def slots(self, keys: Tensor, values: Tensor, *, mass: bool = False) -> tuple[Tensor, ...]:
        """What :meth:`forward` makes of groups, in their dtype, with its shapes checked: key slots,
        value slots, and with `mass` their log-mass.

        Raises:
            ValueError, TypeError: forward did not return two tensors of the documented shapes, or
                three.
        """
        kept = _check.numbers_of(self)[0] or keys.dtype
        made: Any = groups_apart(self, keys.to(kept), values.to(kept))
        where = f"ctx.compression.{type(self).__name__}"
        if not (isinstance(made, (tuple, list)) and len(made) in (2, 3)):
            raise TypeError(f"{where}: forward must return (key slots, value slots), got {made!r}")
        for name, slot, groups in zip(("key", "value"), made[:2], (keys, values), strict=True):
            shape = (*groups.shape[:3], groups.shape[4])
            if slot.shape != shape:
                raise ValueError(f"{where}: {name} slots must be {shape}, got {tuple(slot.shape)}")
        key_slots: Tensor = made[0].to(keys.dtype)
        value_slots: Tensor = made[1].to(values.dtype)
        if not mass:
            return key_slots, value_slots
        given = self.mass(keys) if len(made) == 2 else made[2].to(keys.dtype)
        if given.shape != keys.shape[:3]:
            want, got = tuple(keys.shape[:3]), tuple(given.shape)
            raise ValueError(f"{where}: mass must be {want}, got {got}")
        return key_slots, value_slots, given

    def extra_repr(self) -> str:
        sizes = ("kv_heads", "ratio", "head_dim", "value_dim")
        return ", ".join(f"{name}={getattr(self, name)}" for name in sizes)


class Native(Compressor):
    """A compressor that the engine computes: one operator for training, one kernel for streams."""

    native = True
    #: Its parameters in the engine's order, which gives their shapes and first values.
    operand_names: ClassVar[tuple[str, ...]] = ()
    _kind: ClassVar[str]  # the engine's name for it, where it has parameters
    _kernel = 0  # tokens that "conv" reads for a slot

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "native" not in cls.__dict__ and cls.forward is not Native.forward:
            cls.native = False

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters in the engine's order; those without elements are not made."""
        first = self._first_values(torch.device("meta"))
        return {name: tuple(value.shape) for name, value in first.items()}

    def reset_parameters(self) -> None:
        """First values: conv, dilated and gated start as mean pooling."""
        super().reset_parameters()
        if self.operand_names:
            device = self.get_parameter(self.operand_names[0]).device
            for name, value in self._first_values(device).items():
                if name not in self._left_out:
                    _copy(self.get_parameter(name), value)

    def _first_values(self, device: torch.device) -> dict[str, Tensor]:
        """{name: first value, float64}; on the meta device without the values."""
        if not self.operand_names:
            return {}
        sizes = (self.kv_heads, self.ratio, self.head_dim, self.value_dim, self._kernel)
        values = _C.first_values(self._kind, *sizes, device)
        return dict(zip(self.operand_names, values, strict=True))

    def _leaves_out(self, name: str, shape: tuple[int, ...]) -> bool:
        return 0 in shape or super()._leaves_out(name, shape)  # DDP refuses empty parameters

    def operands(self) -> list[Tensor]:
        """The parameters as the engine takes them."""
        # Called at every step of a stream: a dict is faster than the module's attributes.
        own = self._parameters
        found = [own[name] if name in own else self._operand(name) for name in self._names]
        return cast(list[Tensor], found)

    def _operand(self, name: str) -> Tensor:
        """An attribute that is no parameter now (parametrised, say), or zeros for one not made."""
        if name not in self._left_out:
            return cast(Tensor, getattr(self, name))
        like: Tensor = getattr(self, self._names[0])
        return like.new_zeros(self._left_out[name])

    def _compressed(
        self, keys: Tensor, values: Tensor, ratio: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The engine's slots, with their log-mass where `ratio` is given."""
        made: tuple[Tensor, Tensor, Tensor] = torch.ops.ctx.compress(
            keys, values, self.operands(), self.name, ratio
        )
        return made

    def forward(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Compresses groups; see :meth:`Compressor.forward`."""
        _check.tensors(f"ctx.compression.{type(self).__name__}", keys=keys, values=values)
        key_slots, value_slots, _ = self._compressed(keys, values)
        return key_slots, value_slots

    def mass(self, keys: Tensor) -> Tensor:
        """See :meth:`Compressor.mass`."""
        none = keys.new_zeros(*keys.shape[:4], self.value_dim)
        return self._compressed(keys, none, self.ratio)[2]

    def slots(self, keys: Tensor, values: Tensor, *, mass: bool = False) -> tuple[Tensor, ...]:
        """What the module's call makes of groups; where that is the operator's, it checks."""
        if not self.in_engine:  # a hook or another forward may return anything
            return super().slots(keys, values, mass=mass)
        if mass:
            return self._compressed(keys, values, self.ratio)
        slots: tuple[Tensor, Tensor] = self(keys, values)
        return slots


def _copy(parameter: nn.Parameter, value: Tensor) -> None:
    """Copies values into a parameter, also into one that is sharded (a DTensor)."""
    with torch.no_grad():
        if not hasattr(parameter, "device_mesh"):
            parameter.copy_(value)
            return
        from torch.distributed.tensor.experimental import implicit_replication

        with implicit_replication():
            parameter.copy_(value)
