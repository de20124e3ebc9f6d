"""What every test of bad input asks of an error: its type, and a first line that says where, which
argument, what it must be and what it was."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

import ctx
from ctx.memory_rows import leaves
from ctx.state import PLACE
from strategies import assert_same_bits


def changed(**parts: Callable[[Any], Any]) -> Callable[[ctx.Memory], ctx.Memory]:
    """What makes a memory with other parts, of its last layer; the memory itself stays."""

    def change(memory: ctx.Memory) -> ctx.Memory:
        made = dict(zip(("seen", "rewindable"), memory.clock, strict=True))
        rings = [list(ring) for ring in memory.rings]
        for name, make in parts.items():
            if name in made:
                made[name] = make(made[name])
            else:
                rings[-1][PLACE[name]] = make(rings[-1][PLACE[name]])
        return ctx.Memory(memory.spec, made["seen"], made["rewindable"], rings)

    return change


def with_rings(make: Callable[[Any], Any]) -> Callable[[ctx.Memory], ctx.Memory]:
    """What makes a memory with other lists of tensors."""
    return lambda m: ctx.Memory(m.spec, m.seen, m.rewindable, make(m.rings))


def _tensors(held: ctx.Memory | Mapping[str, Tensor]) -> dict[Any, Tensor]:
    return dict(held) if isinstance(held, Mapping) else dict(enumerate(leaves(held)))


@dataclass(frozen=True)
class Bad:
    """One way of bad input."""

    where: str
    argument: str
    error: type[Exception]
    call: Callable[..., Any]
    got: str = ""  # a regular expression: what the message says the argument was

    def refused(self, *arguments: Any, **held: ctx.Memory | Mapping[str, Tensor]) -> None:
        """Calls with these arguments; what is held must be bit for bit as before afterwards."""
        before = {
            (part, name): tensor.clone()
            for part, tensors in held.items()
            for name, tensor in _tensors(tensors).items()
        }
        with pytest.raises(self.error) as caught:
            self.call(*arguments)
        assert type(caught.value) is self.error, repr(caught.value)
        line = str(caught.value).splitlines()[0]
        named = rf"{re.escape(self.where)}: (?=.*\b{self.argument}\b)"
        grammar = rf"{named}.* must .*\bgot .*(?:{self.got})"
        assert re.match(grammar, line), f"{line!r} does not match {grammar!r}"
        for (part, name), tensor in before.items():
            assert_same_bits(_tensors(held[part])[name], tensor)
