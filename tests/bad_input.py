"""What every test of bad input asks of an error: its type, and a first line that says where, which
argument, what it must be and what it was."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from strategies import assert_same_bits


@dataclass(frozen=True)
class Bad:
    """One way of bad input."""

    where: str
    argument: str
    error: type[Exception]
    call: Callable[..., Any]
    got: str = ""  # a regular expression: what the message says the argument was

    def refused(self, *arguments: Any, **held: Mapping[str, Tensor]) -> None:
        """Calls with these arguments; what is held must be bit for bit as before afterwards."""
        before = {
            (part, name): tensor.clone()
            for part, tensors in held.items()
            for name, tensor in tensors.items()
        }
        with pytest.raises(self.error) as caught:
            self.call(*arguments)
        assert type(caught.value) is self.error, repr(caught.value)
        line = str(caught.value).splitlines()[0]
        named = rf"{re.escape(self.where)}: (?=.*\b{self.argument}\b)"
        grammar = rf"{named}.* must .*\bgot .*(?:{self.got})"
        assert re.match(grammar, line), f"{line!r} does not match {grammar!r}"
        for (part, name), tensor in before.items():
            assert_same_bits(held[part][name], tensor)
