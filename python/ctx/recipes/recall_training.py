"""One model of the recall task: trained in parallel calls, measured as a stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ctx.memory import Memory
from ctx.recipes.errors import RecipeError
from ctx.recipes.recall_task import RecallTask, Tally
from ctx.transformer import CompressiveTransformer

__all__ = ["measure", "train"]

_GOOD = 0.99  # accuracy at which a lesson has nothing left to teach
_RECENT = 10  # steps that it is taken over
_SHARES = (0.4, 0.6, 1.0)  # of all steps, by which the lessons end at the latest
_WARMUP = 50  # steps
_CHUNK = 7  # tokens per call when measured: no multiple of usual segments, on purpose


def train(
    model: CompressiveTransformer,
    task: RecallTask,
    spans: Sequence[tuple[int, int]],
    *,
    steps: int,
    batch: int,
    lr: float,
    generator: torch.Generator,
    advance: Callable[[int, str], None],
) -> int:
    """Trains for `steps`, or until the accuracy in every span of distances is above 99 %.

    The spans (first, last) end where the model's reach does; queries beyond are not trained on:
    nobody can answer them. Every batch is drawn anew, so its accuracy before the step is one on
    data never seen. Returns the steps done; `advance` is told of each.

    Raises:
        RecipeError: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    step, reach = 0, spans[-1][1]
    for number, (lesson, times) in enumerate(task.lessons()):
        recent: list[Tally] = []
        while step < max(number + 1, round(_SHARES[number] * steps)) and step < steps:
            step += 1
            left = (steps - step + 1) / ((1 - _SHARES[1]) * steps)  # falls in the last lesson
            optimizer.param_groups[0]["lr"] = lr * min(1.0, step / _WARMUP, left)
            drawn = lesson.draw(times * batch, generator)
            logits, _ = model(drawn.tokens)
            logits = logits[:, -lesson.length :]
            known = drawn.distances <= reach
            loss = F.cross_entropy(logits[known], drawn.answers[known])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(loss.item()):
                raise RecipeError(f"the loss is not finite at step {step}: lower `lr`")
            optimizer.step()
            tally = Tally(task.farthest)
            tally.add(logits.argmax(-1) == drawn.answers, drawn.distances)
            recent = [*recent, tally][-_RECENT:]
            total = sum(recent, Tally(task.farthest))
            shares = [total.accuracy(*span) for span in spans]
            shares = [share for share in shares if not math.isnan(share)]
            shown = ", ".join(f"{share:.0%}" for share in shares)
            advance(step, f"lesson {number + 1}, loss {loss.item():.3f}, right {shown}")
            if len(recent) == _RECENT and min(shares) > _GOOD:
                break
    return step


def measure(
    model: CompressiveTransformer, task: RecallTask, rows: int, generator: torch.Generator
) -> Tally:
    """Streams fresh sequences through the model's memory, a few tokens per call."""
    tally = Tally(task.farthest)
    model.eval()
    with torch.inference_mode():
        for start in range(0, rows, 128):
            drawn = task.draw(min(128, rows - start), generator)
            memory: Memory = model.init_memory(len(drawn.tokens))
            guesses = []
            for tokens in torch.split(drawn.tokens, _CHUNK, 1):
                logits, memory = model(tokens, memory)
                guesses.append(logits.argmax(-1))
            tally.add(torch.cat(guesses, 1)[:, -task.length :] == drawn.answers, drawn.distances)
    return tally
