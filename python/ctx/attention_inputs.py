"""What a layer's call may be given, checked before anything is written."""

from __future__ import annotations

import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctx import _check, memory_check
from ctx.padding import check_rows

if TYPE_CHECKING:
    from ctx.attention import CompressiveAttention
    from ctx.memory import Memory

__all__ = ["check", "check_auxiliary", "execution_device", "refuse_recomputation"]


def check(
    layer: CompressiveAttention,
    where: str,
    x: Any,
    memory: Memory | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    reset_at: Tensor | None,
    *,
    update: bool,
    return_aux: bool,
) -> None:
    """Raises where an argument of the layer's call does not fit; in a compiled graph only where the
    memory is another's.
    """
    _check.flag(update, "update", where)
    if return_aux:
        check_auxiliary(layer.aux_loss, reset_at, where)
    if torch.compiler.is_compiling():
        if memory is not None:
            memory_check.kind(memory, layer.spec, where)
        return
    _check_x(layer, x, where)
    check_rows(x.shape[0], x.shape[1], lengths, mask, reset_at, where, x.device)
    if memory is not None:
        memory_check.call(memory, layer.spec, x.shape[0], x.device, where, "x")


def _check_x(layer: CompressiveAttention, x: Any, where: str) -> None:
    _check.tensors(where, x=x)
    shape = x.shape
    if len(shape) != 3 or shape[2] != layer.embed_dim:
        got = list(shape)
        raise ValueError(f"{where}: x must be [B, T, E] = [B, T, {layer.embed_dim}], got {got}")
    if shape[0] < 1:
        raise ValueError(f"{where}: x must have at least one row, B >= 1, got {list(shape)}")
    if x.layout != torch.strided:
        raise ValueError(f"{where}: x must be a dense tensor, got {x.layout}")
    k_proj = layer.k_proj
    dtype, device = _check.numbers_of(k_proj, layer)
    # meta: the parameters are brought in when the module is called
    if device is not None and x.device != device and device.type != "meta":
        raise ValueError(f"{where}: x must be on {device} as the parameters, got {x.device}")
    # Where numbers are cast on the way, or a projection is another than torch's (an adapter, a
    # quantised layer), it knows better what it takes.
    cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    exact = None
    if not cast:
        exact = dtype
        if not _is_linear(k_proj):
            others = [one for one in (layer.q_proj, layer.v_proj) if _is_linear(one)]
            exact = _check.numbers_of(*others[:1])[0]
    if not x.is_floating_point() or (exact is not None and x.dtype != exact):
        expected = exact or "floating point"
        raise TypeError(f"{where}: x must be {expected} as the parameters, got {x.dtype}")


def check_auxiliary(aux_loss: str | None, reset_at: Tensor | None, where: str) -> None:
    """Raises unless a call may return an auxiliary loss."""
    if aux_loss is None or reset_at is not None:
        got = "aux_loss=None" if aux_loss is None else "reset_at"
        raise ValueError(
            f"{where}: return_aux must go with an aux_loss and without reset_at, got {got}"
        )


def refuse_recomputation(x: Tensor, where: str) -> None:
    """Raises where reentrant checkpointing runs a call that streams into a memory.

    It runs the call without grad in the forward of an autograd function and again in the backward,
    so that the memory would be streamed into twice. An input that carries a graph while grad is off
    is looked at; elsewhere it is accepted as torch's modules accept it.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not x.requires_grad:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, torch.autograd.function.BackwardCFunction):
                raise ValueError(
                    f"{where}: memory must be None or update=False in the forward of an autograd "
                    f"function, which is recomputed and would stream twice, got a memory in "
                    f"{type(first).__name__}: checkpoint with use_reentrant=False"
                )
        frame = frame.f_back


def _is_linear(layer: nn.Module) -> bool:
    """Whether calling it is torch's own linear map."""
    own = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    return own and "forward" not in layer.__dict__


def execution_device(*modules: nn.Module) -> torch.device | None:
    """The device that parameters are brought to for each call, where they are on meta between:
    accelerate's hook of the first module that has one says it.
    """
    for module in modules:
        hook = getattr(module, "_hf_hook", None)
        for part in (hook, *getattr(hook, "hooks", ())):
            found = getattr(part, "execution_device", None)
            if found is not None:
                return torch.device(found)
    return None
