"""Rows that are not finite, kept out of the products that gradients of other rows are sums of.

The gradient of a weight is a sum over rows, gradient times input. Zero times NaN is NaN: a row that
no loss depends on would still make the whole sum NaN, be it padding, a later token, or a token of
another document. So such a row is zero as an operand, and its result is NaN nevertheless. Where a
loss does depend on it, the gradient of its result is NaN (that of any loss but a linear one), which
passes through: to the weights, and to the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["apart", "groups_apart"]


def apart(x: Tensor, *modules: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    """What modules make of the rows of x [..., width], each [..., any width].

    Without grad, or where every number is finite, the modules are just called.
    """
    if not torch.is_grad_enabled() or _surely_finite(x):
        return tuple([module(x) for module in modules])
    bad = _bad(x, (-1,))
    clean, poison = x.masked_fill(bad, 0.0), _poison(x, bad, (-1,))
    return tuple(_plus(module(clean), poison) for module in modules)


def groups_apart(compressor: nn.Module, keys: Tensor, values: Tensor) -> object:
    """What a compressor makes of groups [B, Hkv, G, n, D] and [B, Hkv, G, n, Dv]: two slots for
    each, or whatever it returns instead of a pair of tensors of four dimensions.
    """
    if not torch.is_grad_enabled() or (_surely_finite(keys) and _surely_finite(values)):
        return compressor(keys, values)
    groups, dims = (keys, values), (-2, -1)
    bad = _bad(keys, dims) | _bad(values, dims)
    made: object = compressor(*(x.masked_fill(bad, 0.0) for x in groups))
    if not (isinstance(made, (tuple, list)) and all(isinstance(x, Tensor) for x in made)):
        return made
    poison = _poison(keys, bad, dims) + _poison(values, bad, dims)
    return tuple(_plus(slot, poison) if slot.dim() == 4 else slot for slot in made)


def _bad(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """True where some number along `dims` is not finite; those dimensions stay, of size one."""
    finite = x.detach().isfinite()
    for dim in dims:
        finite = finite.all(dim, keepdim=True)
    return ~finite


def _poison(x: Tensor, bad: Tensor, dims: tuple[int, ...]) -> Tensor:
    """NaN for rows that are `bad`, else zero, without `dims` but the last. Its gradient reaches the
    row where it is NaN, and is zero otherwise."""
    return (x.masked_fill(~bad, 0.0) * 0.0).sum(dims, keepdim=True).flatten(-len(dims))


def _plus(made: Tensor, poison: Tensor) -> Tensor:
    return made + poison.to(made.dtype)


def _surely_finite(x: Tensor) -> bool:
    """Whether one pass shows every number to be finite; False where nothing can be read: on a
    device, in a graph, under a transform.
    """
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter) or not x.is_cpu:
        return False
    try:
        return math.isfinite(x.detach().sum().item())
    except RuntimeError:  # torch.func.vmap
        return False
