"""`python -m ctx plan`: what a memory of some sizes costs and how far it reaches, without running
it. Bytes are those that the library would allocate; FLOPs count every multiplication and addition
of attention and of the compressor, for one token of one stream, in all layers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctx.cli.options import library_error
from ctx.compression import COMPRESSORS
from ctx.compression.registry import make_compressor
from ctx.hf.loading import load_config
from ctx.hf.model import head_dim_of, layers_of
from ctx.memory import Memory
from ctx.recipes.errors import RecipeError
from ctx.schedule import SIZES, Schedule
from ctx.settings import AttentionSettings
from ctx.spec import Spec, layer_spec

__all__ = ["Shape", "add_parser", "costs", "flops_per_token", "nbytes", "run"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_SLOTS = {**_DTYPES, "int8": torch.int8}
_SHAPE = ("layers", "heads", "kv_heads", "head_dim")


@dataclass(frozen=True)
class Shape:
    """What a model's attention is made of."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int


def add_parser(commands: Any) -> None:
    """Adds the command to `python -m ctx`."""
    parser = commands.add_parser(
        "plan", help="bytes, FLOPs and reach of a memory, without running it", description=__doc__
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR",
        help="a Hugging Face folder, or one with a .gguf file: its shape is read")  # fmt: skip
    add("--layers", type=int, metavar="N", help="in place of --model: layers with a memory")
    add("--heads", type=int, metavar="N", help="in place of --model: query heads")
    add("--kv-heads", type=int, metavar="N", help="key/value heads (default: --heads)")
    add("--head-dim", type=int, metavar="N", help="in place of --model: channels of a key")
    add("--window", type=int, required=True, metavar="M", help="exact tokens behind every query")
    add("--compressed", type=int, required=True, metavar="C", help="slots; 0: a sliding window")
    add("--ratio", type=int, default=4, metavar="c", help="tokens per slot (default: 4)")
    add("--segment", type=int, metavar="S", help="tokens between evictions (default: --ratio)")
    add("--sinks", type=int, default=0, metavar="A", help="first tokens kept for ever (default: 0)")
    add("--compressor", choices=tuple(COMPRESSORS), default="mean", help="(default: mean)")
    add("--max-rewind", type=int, default=64, metavar="N",
        help="spare entries, which can be taken back (default: 64)")  # fmt: skip
    add("--dtype", choices=_DTYPES, default="bfloat16", help="of pairs (default: bfloat16)")
    add("--compressed-dtype", choices=_SLOTS, help="of slots (default: --dtype)")
    add("--streams", type=int, default=1, metavar="N", help="also the bytes of so many")
    add("--context", type=int, metavar="N",
        help="tokens of the full cache to compare with (default: the reach)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Prints a table, a column for each memory."""
    for name, least in (("streams", 1), ("context", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise RecipeError(f"`{name}` must be at least {least}, got {value}")
    try:
        shape = _shape(args)
        sizes = {name: getattr(args, name) for name in SIZES}
        schedule = Schedule(**sizes)
        columns = costs(
            shape,
            schedule,
            compressor=args.compressor,
            max_rewind=args.max_rewind,
            dtype=_DTYPES[args.dtype],
            compressed_dtype=_SLOTS.get(args.compressed_dtype),
            context=args.context,
        )
    except (ImportError, TypeError, ValueError) as error:
        raise library_error(error, (*SIZES, "max_rewind")) from error
    print(
        f"{shape.layers} layers, {shape.heads} query heads over {shape.kv_heads} of "
        f"{shape.head_dim}, pairs in {args.dtype}, slots in {args.compressed_dtype or args.dtype}, "
        f"{args.compressor}\n"
    )
    print(_table(columns))
    if args.streams > 1:
        print(f"\n{args.streams:,} streams: {_bytes(columns[0][1]['bytes'] * args.streams)}")
    return 0


def costs(
    shape: Shape,
    schedule: Schedule,
    *,
    compressor: str = "mean",
    max_rewind: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    compressed_dtype: torch.dtype | None = None,
    context: int | None = None,
) -> list[tuple[str, dict[str, int]]]:
    """(name, {what: number}) of the memory, of a window of as many entries, and of a full cache.

    Args:
        context: tokens of the full cache; None: as many as the memory reaches.

    Raises:
        ValueError, TypeError: a setting is out of range.
    """
    made = [("this memory", schedule, compressor, compressed_dtype)]
    if schedule.compressed:
        least = schedule.resized(window=0, compressed=0)
        alone = least.resized(window=schedule.max_slots - least.max_slots)
        made.append(("window, as many entries", alone, "mean", None))
    columns = []
    for name, sizes, compressed_by, slots in made:
        attend, compress = flops_per_token(shape, sizes, compressed_by)
        held = nbytes(shape, sizes, compressed_by, max_rewind, dtype, slots)
        columns.append((name, {
            "reach": sizes.reach, "entries": sizes.max_slots, "bytes": held,
            "attention": attend, "compression": compress,
        }))  # fmt: skip
    tokens = schedule.reach if context is None else context
    pair = 2 * shape.kv_heads * shape.head_dim * dtype.itemsize
    columns.append((f"full cache, {tokens:,} tokens", {
        "reach": tokens, "entries": tokens, "bytes": shape.layers * tokens * pair,
        "attention": shape.layers * tokens * _per_entry(shape), "compression": 0,
    }))  # fmt: skip
    return columns


def nbytes(
    shape: Shape,
    schedule: Schedule,
    compressor: str,
    max_rewind: int,
    dtype: torch.dtype,
    compressed_dtype: torch.dtype | None = None,
) -> int:
    """Bytes of one stream's memory in all layers, clock included: what ``ctx.Memory`` takes."""
    sizes = (shape.kv_heads, schedule.ratio, shape.head_dim)
    made = make_compressor(compressor, *sizes, device="meta")
    settings = AttentionSettings(schedule=schedule).resolved(shape.head_dim)
    stored = (shape.kv_heads, shape.head_dim, shape.head_dim)
    layer = layer_spec(settings, made, stored, max_rewind, content="kv")
    return Memory.empty(Spec((layer,) * shape.layers), 1, dtype, "meta", compressed_dtype).nbytes


def flops_per_token(shape: Shape, schedule: Schedule, compressor: str) -> tuple[int, int]:
    """FLOPs of the query that attends to the most entries, and of compressing one token: the
    parameters of its compressor are used once for each slot, those of hidden layers and of pooling
    once for each token.
    """
    attend = shape.layers * schedule.max_slots * _per_entry(shape)
    if not schedule.compressed:
        return attend, 0
    width, pairs = shape.head_dim, 2 * shape.kv_heads * shape.layers  # a key and a value
    taps = {"conv": 2 * width * width, "gated": 4 * width}.get(compressor, width)
    if compressor == "dilated":
        made = make_compressor("dilated", 1, schedule.ratio, width, 0, device="meta")
        taps = 2 * sum(parameter.numel() for parameter in made.parameters())
        taps -= 2 * (schedule.ratio - 1) * 2 * width * width  # the last layer: one tap per token
    return attend, pairs * taps


def _per_entry(shape: Shape) -> int:
    """FLOPs of a query and one visible pair: the score and the weighted value of every head."""
    return shape.heads * 4 * shape.head_dim


def _shape(args: argparse.Namespace) -> Shape:
    given = {name: getattr(args, name) for name in _SHAPE}
    if args.model is not None:
        for name, value in given.items():
            if value is not None:
                raise RecipeError(f"`{name}` must be left out with --model, got {value}")
        config = load_config(args.model).get_text_config(decoder=True)
        layers = layers_of(config, "ctx.cli.plan").count(None)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return Shape(layers, heads, kv_heads, head_dim_of(config))
    if given["kv_heads"] is None:
        given["kv_heads"] = given["heads"]
    for name, value in given.items():
        if value is None:
            raise RecipeError(f"`{name}` must be given without --model, got nothing")
        if value < 1:
            raise RecipeError(f"`{name}` must be at least 1, got {value}")
    if given["heads"] % given["kv_heads"]:
        raise RecipeError(
            f"`kv_heads` must divide `heads` = {given['heads']}, got {given['kv_heads']}"
        )
    return Shape(**given)


def _bytes(number: int) -> str:
    size, unit = float(number), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{number:,} bytes" if unit == "bytes" else f"{size:,.1f} {unit}"


def _flops(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


_ROWS: tuple[tuple[str, str, Callable[[int], str]], ...] = (
    ("reach", "reach, tokens", "{:,}".format),
    ("entries", "entries of a query, at most", "{:,}".format),
    ("bytes", "bytes of a stream", _bytes),
    ("attention", "attention FLOPs of a token, at most", _flops),
    ("compression", "compression FLOPs of a token", _flops),
)


def _table(columns: Sequence[tuple[str, dict[str, int]]]) -> str:
    rows = [["", *(name for name, _ in columns)]]
    for key, text, show in _ROWS:
        rows.append([text, *(show(made[key]) for _, made in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    )
