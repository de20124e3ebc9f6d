"""Max pooling."""

from __future__ import annotations

from ctx.compression.base import Native

__all__ = ["Max"]


class Max(Native):
    """The maximum of a group, channel by channel."""

    name = "max"
