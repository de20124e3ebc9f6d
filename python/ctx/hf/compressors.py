"""Compressors that were fitted to one frozen model: sizes, parameters, and how well they do."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctx import _check, memory_files
from ctx.compression import COMPRESSORS, Compressor, make_compressor
from ctx.schedule import SIZES, Schedule

__all__ = ["FittedCompressors", "config_hash", "load_compressors", "weights_hash"]

_FORMAT = "ctx.hf.compressors/1"
_LOAD = "ctx.hf.load_compressors"
#: What of a configuration decides keys and values; sizes of the vocabulary and names do not.
_CONFIG = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rope_parameters", "layer_types", "sliding_window",
    "hidden_act", "attn_logit_softcapping",
)  # fmt: skip


class FittedCompressors(nn.Module):
    """A compressor, a bias and sizes for each full-attention layer of one model.

    What :func:`ctx.hf.fit` returns and :func:`load_compressors` reads. Give it to a cache, which
    takes its sizes: ``ctx.hf.CompressiveCache(model.config, compressor=fitted)``.

    Args:
        compressors: one per full-attention layer, first layer first.
        schedules: likewise.
        kv_heads: key/value heads of a layer.
        distance: ``"slot"`` or ``"token"``.
        config_hash, weights_hash: of the model, see the functions of these names.
        report: losses and settings of the fit, as JSON can hold them.

    Attributes:
        bias: [layers, Hkv], what is added to the scores of slots besides their mass.
    """

    def __init__(
        self,
        compressors: Sequence[Compressor],
        schedules: Sequence[Schedule],
        kv_heads: int,
        distance: str,
        config_hash: str,
        weights_hash: str,
        report: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.compressors = nn.ModuleList(compressors)
        self.schedules = tuple(schedules)
        self.distance = distance
        self.config_hash, self.weights_hash = config_hash, weights_hash
        self.report = dict(report or {})
        self.bias = nn.Parameter(torch.zeros(len(self.schedules), kv_heads))

    @property
    def slots(self) -> int:
        """The most that a query attends to in any layer: sinks, slots and exact tokens."""
        return max(schedule.max_slots for schedule in self.schedules)

    @property
    def mean_slots(self) -> int:
        """The same on average over layers, rounded down: a window of so many tokens in every layer
        takes as much memory.
        """
        return sum(schedule.max_slots for schedule in self.schedules) // len(self.schedules)

    def check_config(self, config: Any, where: str) -> None:
        """Raises unless a decoder's configuration is that of the model of the fit.

        Raises:
            ValueError: it is of another model.
        """
        got = config_hash(config)
        if got != self.config_hash:
            raise ValueError(
                f"{where}: compressor must have been fitted to this model, of configuration "
                f"{got[:12]}, got one for {self.config_hash[:12]}"
            )

    def check_model(self, model: nn.Module, where: str) -> None:
        """Raises unless a model has the configuration and the weights of the fit.

        Raises:
            ValueError: it is another one.
        """
        config: Any = model.config
        self.check_config(config.get_text_config(decoder=True), where)
        got = weights_hash(model)
        if got != self.weights_hash:
            raise ValueError(
                f"{where}: model must have the weights that the compressors were fitted to, "
                f"{self.weights_hash[:12]}, got {got[:12]}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all; :func:`load_compressors` reads it.

        Raises:
            OSError: it cannot be written.
            ValueError: a compressor is of a class that is not registered by its name.
        """
        layers = []
        for made, schedule in zip(self.compressors, self.schedules, strict=True):
            assert isinstance(made, Compressor)
            if COMPRESSORS.get(made.name) is not type(made):
                raise ValueError(
                    "ctx.hf.FittedCompressors.save: compressors must be of registered classes "
                    f"(ctx.compression.register), got {type(made).__name__}"
                )
            geometry = (made.kv_heads, made.head_dim, made.value_dim, made.overlap)
            layers.append({"name": made.name, "sizes": schedule.numbers, "geometry": geometry})
        said = {
            "format": _FORMAT,
            "layers": layers,
            "distance": self.distance,
            "config": self.config_hash,
            "weights": self.weights_hash,
            "report": self.report,
        }
        tensors = dict(self.state_dict())
        where = "ctx.hf.FittedCompressors.save"
        memory_files.replaced(path, memory_files.encoded(said, tensors, where), where)

    def extra_repr(self) -> str:
        return f"slots={self.slots}, mean_slots={self.mean_slots}, distance={self.distance!r}"


def load_compressors(
    path: str | os.PathLike[str], model: nn.Module | None = None
) -> FittedCompressors:
    """Reads what :func:`ctx.hf.fit` or ``python -m ctx fit`` wrote.

    Args:
        path: the file.
        model: checked to be the one that they were fitted to; None: the cache checks the
            configuration alone.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, of another version, or fitted to another model.
    """
    name = os.fsdecode(_check.path(path, _LOAD))
    with open(name, "rb") as file:
        data = file.read()
    try:  # files that the package of safetensors wrote have no checksum
        said, tensors = memory_files.decoded(data, _LOAD, checked=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{_LOAD}: path must be a file of ctx.hf.FittedCompressors.save, got {name!r} "
            f"({str(error).removeprefix(f'{_LOAD}: ')})"
        ) from None
    if not isinstance(said, dict) or said.get("format") != _FORMAT:
        got = said.get("format") if isinstance(said, dict) else said
        raise ValueError(f"{_LOAD}: path must be a file of format {_FORMAT}, got {got!r}")
    fitted = _made(said, name)
    try:
        fitted.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"{_LOAD}: path must be a whole file, got {name!r} ({first})") from None
    fitted.requires_grad_(False)
    if model is not None:
        fitted.check_model(model, _LOAD)
    return fitted


def _made(said: Mapping[str, Any], name: str) -> FittedCompressors:
    """The compressors that a file's header describes, with first values."""
    try:
        layers = said["layers"]
        schedules = [Schedule(**dict(zip(SIZES, x["sizes"], strict=True))) for x in layers]
        compressors = []
        for layer, schedule in zip(layers, schedules, strict=True):
            kv_heads, head_dim, value_dim, overlap = layer["geometry"]
            kernel = schedule.ratio + overlap if layer["name"] == "conv" else None
            sizes = (kv_heads, schedule.ratio, head_dim, value_dim)
            compressors.append(make_compressor(layer["name"], *sizes, kernel=kernel))
        heads = layers[0]["geometry"][0]
        return FittedCompressors(
            compressors,
            schedules,
            heads,
            said["distance"],
            said["config"],
            said["weights"],
            said["report"],
        )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{_LOAD}: path must be a whole file, got {name!r} ({error})") from None


def config_hash(config: Any) -> str:
    """SHA-256 of what a decoder's configuration says of its keys and values."""
    said = {name: getattr(config, name, None) for name in _CONFIG}
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the beginning of each weight in bfloat16: the same for a model in float32 and its
    copy in bfloat16.
    """
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        first: Tensor = weight.detach().reshape(-1)[:64].to("cpu", torch.bfloat16)
        found.update(name.encode())
        found.update(first.view(torch.int16).numpy().tobytes())
    return found.hexdigest()
