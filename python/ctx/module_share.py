"""A second module tree over the same parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["share"]


def share(module: Any, made: dict[nn.Module, Any] | None = None) -> Any:
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
            name: None if child is None else share(child, made)
            for name, child in module._modules.items()
        }
    return made[module]
