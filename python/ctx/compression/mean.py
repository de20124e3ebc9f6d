"""Mean pooling."""

from __future__ import annotations

from ctx.compression.base import Native

__all__ = ["Mean"]


class Mean(Native):
    """The mean of a group."""

    name = "mean"
