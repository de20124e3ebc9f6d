"""Trains models on text to their last step, or to a signal; always ends with a checkpoint."""

from __future__ import annotations

import signal
from typing import Any

from ctx.recipes import checkpoint
from ctx.recipes.compare import Rival
from ctx.recipes.errors import RecipeError
from ctx.recipes.loading import load_settings
from ctx.recipes.progress import Progress
from ctx.recipes.run_folder import RunFolder
from ctx.recipes.trainer import Trainer

__all__ = ["rival_trainer", "train"]


def train(trainer: Trainer, folder: RunFolder, parts: dict[str, Any], *, last: bool) -> bool:
    """Trains to the last step and writes metrics and checkpoints.

    Args:
        parts: what a checkpoint holds besides the trainer's state: files, digest, compare.
        last: whether no other model is trained after this one.

    Returns:
        False where SIGINT or SIGTERM came before the last step, or during it with more models to
        come.
    """
    settings = trainer.settings
    smooth = None
    with _Stop() as stop, Progress("training", settings.steps, trainer.step) as progress:
        while trainer.step < settings.steps and not stop.asked:
            metrics = trainer.train_step()
            folder.log(metrics)
            loss, speed = metrics["bits_per_byte"], metrics["tokens_per_second"]
            smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
            progress.to(trainer.step, f"{smooth:.3f} bits/byte {speed:,.0f} tokens/s")
            if trainer.step % settings.checkpoint_every == 0:
                checkpoint.save(folder.checkpoint, {**parts, **trainer.state()})
        checkpoint.save(folder.checkpoint, {**parts, **trainer.state()})
    return trainer.step == settings.steps and (last or not stop.asked)


def rival_trainer(
    rival: Rival, trainer: Trainer, folder: RunFolder, digest: str
) -> tuple[Trainer, RunFolder]:
    """Another model with the settings and text of `trainer`, from its checkpoint if it has one.

    Raises:
        RecipeError: its folder holds another model, or one of another text.
    """
    path = folder.path / rival.folder
    other = Trainer(rival.config, trainer.settings, trainer.corpus)
    if not (path / checkpoint.FILE_NAME).exists():
        return other, RunFolder(path)
    state = checkpoint.load(path / checkpoint.FILE_NAME)
    if (state["digest"], load_settings(state)[0]) != (digest, rival.config):
        raise RecipeError(f"{path} must hold {rival.name!r} of this run, got another model or text")
    other.load(state)
    return other, RunFolder(path, resumed=other.step)


class _Stop:
    """Turns the first SIGINT or SIGTERM into a request; the second one acts as usual."""

    asked = False

    def __enter__(self) -> _Stop:
        self._before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
        for name in self._before:
            signal.signal(name, self._ask)
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        self.__exit__()

    def __exit__(self, *exception: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)
