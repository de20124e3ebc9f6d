"""Continuing a text: how the next token is drawn (temperature, top-k, top-p, seed)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ctx import _check, memory_check, transformer_inputs
from ctx.memory import Memory
from ctx.memory_rows import leaves
from ctx.padding import moved

__all__ = ["Sampling", "Stop", "start"]


#: What ends a row: a token, several, or what says of the drawn int64 [B] which rows are to stop.
Stop = int | Sequence[int] | Tensor | Callable[[Tensor], Tensor]


def _as_stop(stop: Any, vocab_size: int, where: str) -> Callable[[Tensor], Tensor] | None:
    """`stop` as a function from drawn tokens, int64 [B], to bool [B]; None where nothing stops.

    Raises:
        TypeError, ValueError: it is none of what a stop can be, or a token that cannot be drawn.
    """
    if stop is None:
        return None
    if callable(stop) and not isinstance(stop, Tensor):
        return lambda drawn: _stopped(stop(drawn), drawn, where)
    kind = "a token, a list of tokens or a callable"
    if isinstance(stop, Tensor):
        if stop.dtype != torch.int64 or stop.dim() > 1:
            got = f"{stop.dtype} {list(stop.shape)}"
            raise TypeError(f"{where}: stop must be {kind}, got a tensor {got}")
        stop = stop.reshape(-1).tolist()
    elif hasattr(stop, "__iter__") and not isinstance(stop, (str, bytes)):
        stop = list(stop)
    else:
        stop = [stop]
    ids = [_check.integer(one, "stop", where, kind=kind) for one in stop]
    for one in ids:
        if not 0 <= one < vocab_size:
            raise ValueError(f"{where}: stop must be tokens in [0, {vocab_size}), got {one}")
    if not ids:
        raise ValueError(f"{where}: stop must name at least one token, got none")
    return lambda drawn: torch.isin(drawn, torch.tensor(ids, device=drawn.device))


def _stopped(said: Any, drawn: Tensor, where: str) -> Tensor:
    """What a callable said, checked."""
    if not isinstance(said, Tensor) or said.dtype != torch.bool or said.shape != drawn.shape:
        got = f"{said.dtype} {list(said.shape)}" if isinstance(said, Tensor) else repr(said)
        raise TypeError(f"{where}: stop must return bool [B] = [{drawn.shape[0]}], got {got}")
    return said.to(drawn.device)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from logits; checked where it is made.

    Args:
        temperature: >= 0; 0 takes the likeliest token.
        top_k: >= 1 or None; k beyond the vocabulary keeps everything.
        top_p: in (0, 1] or None; the likeliest token is always kept.
        seed: of a generator of its own, or None for torch's global one.
        where: who is to blame in error messages.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    where: str = "ctx.generation.Sampling"

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if value is None and name == "top_p":
                continue
            object.__setattr__(self, name, _check.number(value, name, self.where))
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if value is not None:
                value = _check.integer(value, name, self.where, kind="an int or None")
                object.__setattr__(self, name, value)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"{self.where}: temperature must be finite and at least 0, got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"{self.where}: top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"{self.where}: top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(
                f"{self.where}: seed must be at least 0 and below 2**63, got {self.seed}"
            )

    def sampler(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """A function from logits [B, V] to drawn tokens int64 [B], with its own random numbers."""
        generator = None
        if self.seed is not None:
            generator = torch.Generator(device).manual_seed(self.seed)

        def draw(logits: Tensor) -> Tensor:
            if self.temperature == 0:
                return logits.argmax(-1)
            return torch.multinomial(self.probabilities(logits), 1, generator=generator)[:, 0]

        return draw

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that is drawn from, [B, V]; needs temperature > 0."""
        logits = logits.float()
        # Relative to the maximum, so that a tiny temperature cannot overflow the likeliest token.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept, index = logits.topk(self.top_k)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, index, kept)
        probabilities = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, index = probabilities.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # of all likelier tokens: 0 for the first
            ordered = ordered.masked_fill(before >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
        return probabilities


def start(
    model: Any,
    tokens: Tensor,  # [B, T]
    num_tokens: int,
    memory: Memory | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    settings: Sampling,
    stop: Stop | None,
) -> Iterator[Tensor]:
    """The drawn tokens of :meth:`ctx.CompressiveTransformer.stream`, once all arguments fit."""
    where = settings.where
    held = memory_check.widened(memory)
    transformer_inputs.check(model, tokens, held, where, lengths, mask)
    if tokens.shape[1] < 1:
        raise ValueError(f"{where}: tokens must be [B, T] with T >= 1, got {list(tokens.shape)}")
    num_tokens = _check.integer(num_tokens, "num_tokens", where, 0)
    stops = _as_stop(stop, model.config.vocab_size, where)
    tokens, lengths, _ = moved(tokens, mask, lengths, None)
    if lengths is not None and tokens.device.type == "cpu" and int(lengths.min()) < 1:
        name = "lengths" if mask is None else "mask"
        row = int(lengths.argmin())
        raise ValueError(f"{where}: {name} must leave at least one token, got none in row {row}")
    if memory is None:
        memory = model.init_memory(len(tokens))
    return _draw(model, tokens, lengths, num_tokens, memory, settings, stops)


def _draw(
    model: Any,
    tokens: Tensor,  # [B, T]
    lengths: Tensor | None,
    num_tokens: int,
    memory: Memory,
    settings: Sampling,
    stop: Callable[[Tensor], Tensor] | None,
) -> Iterator[Tensor]:
    """Streams the tokens, then as many drawn ones but the last, and yields each, int64 [B].

    A row that has stopped yields its last token again and streams no more; where all have, the end
    has come.

    The model is called as a module, so that hooks run and shards are gathered; without grad, but
    not in inference mode, whose tensors sharding and the caller's graphs cannot take.
    """
    sample = settings.sampler(tokens.device)
    ended: Tensor | None = None  # bool [B]
    for step in range(max(num_tokens, 1)):
        with torch.no_grad():  # never across a yield: it would leak to the caller
            logits = _read(model, tokens, lengths, memory)
            if not num_tokens:  # the prompt is read all the same
                return
            drawn = sample(logits)
            if ended is not None:
                drawn = torch.where(ended, tokens[:, 0], drawn)
            tokens, lengths = drawn[:, None], None
            if stop is not None:
                now = stop(drawn.clone())
                ended = now if ended is None else ended | now
                lengths = ended.logical_not().long()
        yield drawn.clone()  # the caller may write to it
        if ended is not None and step < num_tokens - 1 and bool(ended.all()):
            return


def _read(model: Any, tokens: Tensor, lengths: Tensor | None, memory: Memory) -> Tensor:
    """Streams the tokens and returns the logits behind the last of every row, [B, V]."""
    # A long prompt is read at constant memory, too.
    block = max(64, *(schedule.segment for schedule in model.schedules))
    newest: Tensor | None = None
    for first in range(0, tokens.shape[1], block):
        chunk = tokens[:, first : first + block]
        count = None if lengths is None else (lengths - first).clamp(0, chunk.shape[1])
        logits, after = model(chunk, memory, lengths=count, last_only=True)
        _take_over(memory, after)
        if newest is None or count is None:
            newest = logits
        else:  # a row that ended in an earlier chunk keeps what it had
            newest = torch.where((count > 0)[:, None], logits, newest)
    assert newest is not None
    return newest


def _take_over(memory: Memory, after: Memory) -> None:
    """Writes to `memory` what a call left elsewhere: a wrapper may copy what a block is given."""
    for mine, made in zip(leaves(memory), leaves(after), strict=True):
        if mine is not made:
            mine.copy_(made)
