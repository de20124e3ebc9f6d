"""The methods of :class:`ctx.Memory` as functions of a memory, by their older names."""

from ctx.memory import Memory

__all__ = ["clone", "merge", "reset", "resized", "rewind", "select", "to"]

clone = Memory.clone
merge = Memory.merge
reset = Memory.reset
resized = Memory.resized
rewind = Memory.rewind
select = Memory.select
to = Memory.to
