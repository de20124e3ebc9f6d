"""Losses of a text that is streamed through a model with several caches side by side."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctx import _check
from ctx.hf.evaluation.candidates import Candidate

__all__ = ["Scores", "attention_restored", "nbytes_of", "stream"]

_WHERE = "ctx.hf.evaluation.stream"
#: Tokens whose whole distributions are compared at a time.
_ROWS = 128


@dataclass(frozen=True)
class Scores:
    """What one candidate says of a text.

    Args:
        name: the candidate's.
        first: index of the first token that is scored.
        losses: of each token from `first` on, -log p in nats, float32 [N].
        hits: whether that token was the likeliest, bool [N].
        kl: KL(reference || candidate) of the distribution that the token is drawn from, in nats,
            float32 [N]; as far as the reference goes; None where not asked for, and of the
            reference itself.
        seconds: that the model and its losses took.
        nbytes: of the cache at the end.
        tokens: that were read.
    """

    name: str
    first: int
    losses: Tensor
    hits: Tensor
    kl: Tensor | None
    seconds: float
    nbytes: int
    tokens: int


def stream(
    model: Any,
    ids: Tensor,  # int64 [N]
    candidates: Sequence[Candidate],
    *,
    chunk: int = 512,
    start: int = 0,
    kl: bool = False,
    advance: Callable[[int], None] | None = None,
) -> list[Scores]:
    """Streams a text through every candidate, in chunks that take turns.

    Logits exist for one chunk of one candidate at a time (of two with `kl`, of which the first
    candidate is the reference). The model's attention implementation and mode are as before
    afterwards.

    Args:
        model: a causal language model of transformers.
        ids: the text's tokens, N >= 2, on any device.
        candidates: at least one.
        chunk: tokens per call, >= 1.
        start: the first token to score; 0 and 1 are the same, as the first token is given.
        kl: whether whole distributions are compared with those of the first candidate.
        advance: is told how many tokens were read, in all the text for every candidate, or its
            limit.

    Returns:
        One for each candidate; of those with a limit of at most `start` nothing is scored.

    Raises:
        ValueError: an argument is out of range, or the cache is one that the model cannot have.
    """
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"{_WHERE}: ids must be [N], N >= 2, got {list(ids.shape)}")
    chunk = _check.integer(chunk, "chunk", _WHERE, 1)
    start = _check.integer(start, "start", _WHERE, 0)
    first = max(start, 1)
    if first >= len(ids):
        raise ValueError(
            f"{_WHERE}: start must be below the number of tokens, {len(ids)}, got {start}"
        )
    if not candidates or len({one.name for one in candidates}) < len(candidates):
        raise ValueError(
            f"{_WHERE}: candidates must be at least one, of different names, "
            f"got {[one.name for one in candidates]}"
        )
    ids = ids.to(model.device)
    with torch.inference_mode(), attention_restored(model):
        running = [_Running(one, model, ids, first) for one in candidates]
        for begin in range(0, len(ids), chunk):
            reference: Tensor | None = None
            for number, one in enumerate(running):
                end = min(begin + chunk, one.end)
                if begin >= end:
                    continue
                logits = one.read(model, begin, end)
                if kl and number == 0:
                    reference = logits
                elif reference is not None and logits is not None:
                    one.compare(reference, logits)
                if advance is not None:
                    advance(end - begin)
        return [one.scores(kl and number > 0) for number, one in enumerate(running)]


class _Running:
    """A candidate in the middle of a text."""

    def __init__(self, candidate: Candidate, model: Any, ids: Tensor, first: int) -> None:
        self.candidate, self.ids, self.first = candidate, ids, first
        self.end = len(ids) if candidate.limit is None else min(len(ids), candidate.limit)
        self.cache = candidate.make(model)
        self.attention = candidate.attention_for(model)
        parameters = inspect.signature(model.forward).parameters
        self.keeps = "logits_to_keep" in parameters
        # As transformers calls it since 5.24, and before.
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
        self.losses: list[Tensor] = []
        self.hits: list[Tensor] = []
        self.kl: list[Tensor] = []
        self.seconds = 0.0

    def read(self, model: Any, begin: int, end: int) -> Tensor | None:
        """Reads tokens begin to end; logits [n, V] of those whose next token is scored, if any."""
        if model.config._attn_implementation != self.attention:
            model.set_attn_implementation(self.attention)
        began = time.perf_counter()
        scored = range(max(begin, self.first - 1), min(end, self.end - 1))
        options: dict[str, Any] = {self.cache_name: self.cache, "use_cache": True}
        if self.keeps:  # logits from the first scored token to the chunk's end, or of one token
            options["logits_to_keep"] = max(1, end - scored.start)
        part = self.ids[None, begin:end]
        out = model(part, **options).logits[0]
        logits: Tensor | None = None
        if scored:
            behind = end - scored.stop
            logits = out[len(out) - behind - len(scored) : len(out) - behind].float()
            target = self.ids[scored.start + 1 : scored.stop + 1]
            self.losses.append(F.cross_entropy(logits, target, reduction="none").cpu())
            self.hits.append((logits.argmax(-1) == target).cpu())
        self.seconds += time.perf_counter() - began
        return logits

    def compare(self, reference: Tensor, logits: Tensor) -> None:
        """Adds KL(reference || this) of logits [n, V], as far as the reference goes."""
        count = min(len(reference), len(logits))
        for begin in range(0, count, _ROWS):
            rows = slice(begin, min(begin + _ROWS, count))
            theirs, ours = (x[rows].log_softmax(-1) for x in (reference, logits))
            self.kl.append((theirs.exp() * (theirs - ours)).sum(-1).cpu())

    def scores(self, kl: bool) -> Scores:
        none = torch.zeros(0)
        return Scores(
            self.candidate.name,
            self.first,
            torch.cat([none, *self.losses]),
            torch.cat([none.bool(), *self.hits]),
            torch.cat([none, *self.kl]) if kl else None,
            self.seconds,
            nbytes_of(self.cache),
            self.end,
        )


@contextlib.contextmanager
def attention_restored(model: Any) -> Iterator[None]:
    """In it the model is in evaluation mode and may be given other attention implementations, of
    which "ctx" is one.
    """
    from ctx.hf import register

    register()
    before, training = model.config._attn_implementation, model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


def nbytes_of(cache: Any) -> int:
    """Bytes that a cache of transformers, or one of this library, holds."""
    size = int(getattr(cache, "nbytes", 0))
    for layer in cache.layers:
        size += sum(x.nbytes for x in vars(layer).values() if isinstance(x, Tensor))
    return size
