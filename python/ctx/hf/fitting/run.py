"""ctx.hf.fit: compressors for a frozen model, out of text."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ctx.compression import COMPRESSORS, Compressor
from ctx.hf.compressors import FittedCompressors, config_hash, weights_hash
from ctx.hf.fitting.allocation import OneLayer, allocate, further_sizes, held_out
from ctx.hf.fitting.excerpts import Excerpts, excerpts_of, tokens_of
from ctx.hf.fitting.layer import error_of, fit_layer, problems_of
from ctx.hf.fitting.partial import Partial, fit_hash
from ctx.hf.fitting.recording import Recorded, record
from ctx.hf.fitting.settings import FitSettings, placed_in, placements_of
from ctx.hf.fitting.whole import WholeFit
from ctx.hf.layer_law import LayerLaw, laws_of
from ctx.hf.model import layers_of
from ctx.schedule import Schedule

__all__ = ["ProgressLike", "fit"]

_WHERE = "ctx.hf.fit"


class ProgressLike(Protocol):
    """What is told how far a fit is: `stage` "record", "layers", "alone", "allocation" or
    "end to end", how many of how many are done, and the latest losses in words.
    """

    def __call__(self, stage: str, done: int, total: int, said: str, /) -> None: ...


def fit(
    model: Any,
    texts: str | Tensor | Sequence[str | Tensor],
    *,
    tokenizer: Any = None,
    partial: str | os.PathLike[str] | None = None,
    progress: ProgressLike | None = None,
    **settings: Any,
) -> FittedCompressors:
    """Fits compressors to a frozen model, so that a bounded memory says what the full cache says.

    1. Excerpts of the texts run through the model under full attention; keys, values, some random
       queries and their outputs are recorded in each full-attention layer.
    2. Each layer's compressor, and a bias per kv head, are fitted to give these outputs, seen
       through the layer's output projection, for several placements: no slots, or an eighth, a
       quarter or half of the entries. The placement of the smallest error on the validation
       excerpts stays, so no layer is worse than the window there.
    3. With ``allocation="measured"`` layers get different numbers of entries, `slots` on average:
       KL(full ‖ compressed) of the model's predictions is measured with one layer compressed at a
       time, by its size, on a validation excerpt; the sizes of the smallest sum stay.
    4. With ``end_to_end`` all layers together minimise KL(full ‖ compressed) of the model's own
       predictions.

    Runs bit for bit the same with the same arguments and number of threads. The model is used as
    it is (device, dtype) and left as it was.

    Source: none; compressors are those of Rae et al. 2019 (arXiv:1911.05507) and of this library,
    the mass is that of :class:`ctx.AttentionSettings`.

    Args:
        model: a decoder of Hugging Face that :class:`ctx.hf.CompressiveCache` takes.
        texts: strings, or tokens int64 [n]: one or several, of (excerpts + validation) *
            excerpt_tokens tokens at least.
        tokenizer: of the model, for strings.
        partial: a file that keeps what is done and from which the same call goes on after an
            interruption; removed at the end.
        progress: see :class:`ProgressLike`.
        slots: the most entries that a query may attend to in a layer (on average over layers
            where they are allocated): sinks, slots, exact tokens, and those that wait for their
            group to fill; default 512.
        ratio: tokens per slot, >= 2; default 4.
        sinks: first tokens, kept exactly; default 4.
        compressor: a name of :data:`ctx.compression.COMPRESSORS`; default "gated". "most_used" has
            no parameters, but gets a bias and a placement.
        distance: ``"slot"`` (default; bounded) or ``"token"``.
        allocation: ``"equal"`` (default): every layer has `slots` entries; ``"measured"``: half,
            one, two or four times as many, as step 3 finds, and all together no more.
        excerpts, validation: their numbers, default 6 and 2.
        excerpt_tokens: tokens of an excerpt, default 4,096, not more than the model was trained
            for.
        queries: random queries per excerpt, default 112.
        steps, lr: of Adam in each layer, default 60 and 3e-2, which falls linearly to 1e-3.
        end_to_end: whether step 4 runs, default False; then
        end_to_end_steps, end_to_end_tokens, end_to_end_queries, end_to_end_lr: 48, 2,048, 512 and
            1e-2 by default.
        seed: of excerpts' queries and order, default 0.

    Returns:
        The compressors, whose ``report`` has settings and losses. Nothing requires a gradient.

    Raises:
        ValueError, TypeError: a setting is out of range, the texts are too short, the model is one
            that cannot be, or ``partial`` is of another fit; the message names it.
    """
    try:
        asked = FitSettings(**settings)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise TypeError(f"{_WHERE}: {str(error).partition(') ')[2] or error}") from None
    if asked.compressor not in COMPRESSORS:
        raise ValueError(
            f"{_WHERE}: compressor must be one of {', '.join(COMPRESSORS)}, "
            f"got {asked.compressor!r}"
        )
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise TypeError(f"{_WHERE}: model must be a transformers model, got {type(model).__name__}")
    return _Fit(model, tokens_of(texts, tokenizer), asked, partial, progress).run()


class _Fit:
    """One fit."""

    def __init__(
        self,
        model: Any,
        texts: list[Tensor],
        settings: FitSettings,
        partial: str | os.PathLike[str] | None,
        progress: ProgressLike | None,
    ) -> None:
        self.model, self.texts, self.settings = model, texts, settings
        self.config = model.config.get_text_config(decoder=True)
        most = getattr(self.config, "max_position_embeddings", None)
        if most is not None and settings.excerpt_tokens > most:
            raise ValueError(
                f"{_WHERE}: excerpt_tokens must be at most the model's max_position_embeddings = "
                f"{most}, got {settings.excerpt_tokens}"
            )
        self.placements = placements_of(settings)
        self.layers = layers_of(self.config, _WHERE).count(None)
        self.hashes = (config_hash(self.config), weights_hash(model))
        first = str(next(model.parameters()).dtype)
        done = fit_hash(settings.to_dict(), self.hashes, first, *texts)
        self.partial = Partial(partial, done)
        self.said = progress

    def tell(self, stage: str, done: int, total: int, said: str = "") -> None:
        """Says how far it is."""
        if self.said is not None:
            self.said(stage, done, total, said)

    def laws(self, schedules: Sequence[Schedule], biases: Sequence[Tensor]) -> list[LayerLaw]:
        """The laws of all layers, with new compressors."""
        s = self.settings
        names = [s.compressor if x.compressed else "mean" for x in schedules]
        return laws_of(
            self.config, schedules, names, _WHERE,
            distance=s.distance, slot_mass=True, max_rewind=1, biases=biases,
        )  # fmt: skip

    @torch.no_grad()
    def run(self) -> FittedCompressors:
        """All steps."""
        training, grads = self.model.training, [x.requires_grad for x in self.model.parameters()]
        self.model.eval().requires_grad_(False)
        try:
            laws, report = self._layers()
            if self.settings.allocation == "measured":
                laws = self._allocated(laws, report)
            if self.settings.end_to_end:
                report["end_to_end"] = self._whole(laws)
        finally:
            self.model.train(training)
            for weight, needed in zip(self.model.parameters(), grads, strict=True):
                weight.requires_grad_(needed)
        made = self._result(laws, report)
        self.partial.done()
        return made

    def _layers(self) -> tuple[list[LayerLaw], dict[str, Any]]:
        """Steps 1 and 2."""
        s, done = self.settings, self.partial.state["layers"]
        if len(done) < self.layers:
            excerpts = excerpts_of(self.texts, s)
            recorded = self._record(excerpts)
            for layer in range(self.layers):
                if layer >= len(done):
                    done.append(self._layer(recorded[layer], excerpts))
                    self.partial.keep()
                recorded[layer] = None  # type: ignore[call-overload]
                self.tell("layers", layer + 1, self.layers, _words(done[layer]))
        schedules = [self.placements[x["placement"]] for x in done]
        biases = [x["bias"].clone() for x in done]
        laws = self.laws(schedules, biases)
        for law, x in zip(laws, done, strict=True):
            law.measure(tuple(x["geometry"]), x["bias"].device, _WHERE)
            law.compressor.load_state_dict(x["compressor"])
        losses = [{k: x[k] for k in ("placement", "validation")} for x in done]
        return laws, {"settings": s.to_dict(), "layers": losses}

    def _record(self, excerpts: Excerpts) -> list[Recorded]:
        number = len(excerpts.tokens)
        count = iter(range(1, number + 1))
        self.tell("record", 0, number)
        every = COMPRESSORS[self.settings.compressor].by_usage
        return record(self.model, excerpts, every, lambda: self.tell("record", next(count), number))

    def _layer(self, recorded: Recorded, excerpts: Excerpts) -> dict[str, Any]:
        """The best placement of a layer, and what was fitted for it."""
        s, errors = self.settings, list[float]()
        best: dict[str, Any] | None = None
        heads, device = recorded.keys.shape[1], recorded.keys.device
        geometry = (heads, recorded.keys.shape[3], recorded.values.shape[3])
        for placement, schedule in enumerate(self.placements):
            bias = torch.zeros(heads, device=device, requires_grad=True)
            (law,) = self.laws([schedule], [bias])
            law.measure(geometry, device, _WHERE)
            if schedule.compressed:
                problems = problems_of(law, recorded, excerpts.queries, excerpts.training)
                fit_layer(law, problems, s.steps, s.lr)
            held = problems_of(law, recorded, excerpts.queries, excerpts.validating)
            errors.append(error_of(held))
            if best is None or errors[-1] < best["error"]:
                kept = {k: x.detach().clone() for k, x in law.compressor.state_dict().items()}
                best = {
                    "placement": placement, "error": errors[-1], "bias": bias.detach().clone(),
                    "compressor": kept, "geometry": list(geometry),
                }  # fmt: skip
        assert best is not None
        return {**best, "validation": errors}

    def _allocated(self, laws: list[LayerLaw], report: dict[str, Any]) -> list[LayerLaw]:
        """Step 3: the same compressors over memories of other sizes."""
        s, numbers = self.settings, range(len(laws))
        made = {(layer, s.slots): laws[layer] for layer in numbers}
        costs: dict[tuple[int, int], float] = self.partial.state["alone"]

        @functools.cache  # not made where all is measured already
        def alone() -> OneLayer:
            return OneLayer(self.model, *held_out(excerpts_of(self.texts, s), s))

        def measure(stage: str, pairs: Sequence[tuple[int, int]]) -> None:
            for done, (layer, size) in enumerate(pairs, 1):
                if (layer, size) not in made:
                    made[layer, size] = self._resized(laws[layer], size)
                if (layer, size) not in costs:
                    costs[layer, size] = alone().kl(layer, made[layer, size])
                    self.partial.keep()
                said = f"layer {layer}, {size} entries: KL {costs[layer, size]:.4f}"
                self.tell(stage, done, len(pairs), said)

        measure("alone", list(made))
        further = further_sizes([costs[layer, s.slots] for layer in numbers], s)
        measure("allocation", further)
        by_layer = [{size: costs[x, size] for at, size in made if at == x} for x in numbers]
        chosen = allocate(by_layer, s.slots * len(laws))
        for layer, size in enumerate(chosen):
            report["layers"][layer] |= {"entries": size, "alone": sorted(by_layer[layer].items())}
        return [made[layer, size] for layer, size in enumerate(chosen)]

    def _resized(self, law: LayerLaw, slots: int) -> LayerLaw:
        """A law with the same compressor and bias over so many entries."""
        assert law.bias is not None and law.geometry is not None
        (made,) = self.laws([placed_in(slots, law.schedule)], [law.bias.clone()])
        made.measure(law.geometry, law.bias.device, _WHERE)
        made.compressor.load_state_dict(law.compressor.state_dict())
        return made

    def _whole(self, laws: list[LayerLaw]) -> list[float]:
        """Step 3."""
        for law in laws:
            assert law.bias is not None
            law.bias.requires_grad_(True)
        steps = self.settings.end_to_end_steps
        whole = WholeFit(self.model, laws, self.texts, self.settings)
        if self.partial.state["whole"] is not None:
            whole.restore(self.partial.state["whole"])

        def advance(fit: WholeFit) -> None:
            done = len(fit.losses)
            if self.partial.path is not None:
                self.partial.state["whole"] = fit.state()
                self.partial.keep()
            self.tell("end to end", done, steps, f"KL {fit.losses[-1]:.4f}")

        whole.run(advance)
        return whole.losses

    def _result(self, laws: list[LayerLaw], report: dict[str, Any]) -> FittedCompressors:
        compressors: list[Compressor] = [law.compressor for law in laws]
        schedules = [law.schedule for law in laws]
        heads = compressors[0].kv_heads
        made = FittedCompressors(
            compressors, schedules, heads, self.settings.distance, *self.hashes, report
        )
        made.to(next(self.model.parameters()).device)
        for layer, law in enumerate(laws):
            assert law.bias is not None
            made.bias.data[layer].copy_(law.bias)
        return made.requires_grad_(False)


def _words(layer: dict[str, Any]) -> str:
    return f"error {layer['error']:.4f}, window alone {layer['validation'][0]:.4f}"
