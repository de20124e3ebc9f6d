"""A model as a file that streams without Python: one call of it, by torch.export and AOTInductor.

:func:`program` is the call as a graph of tensors, :func:`save` compiles that into a package
(``.pt2``), which a C++ program loads with ``torch::inductor::AOTIModelPackageLoader`` and links
``ctx::ctx`` for. The memory is an input of every call and is written in place, so that one package
serves any number of streams; its tensors are a ``ctx::rows::State`` (``ctx/rows.h``).
`examples/cpp/stream` is such a program.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctx import _check
from ctx.memory import Memory
from ctx.memory_rows import leaves
from ctx.module_share import share
from ctx.state import TENSORS
from ctx.transformer import CompressiveTransformer

__all__ = ["FORMAT", "Step", "program", "save"]

#: Version of a package's inputs, outputs and metadata.
FORMAT = 1


class Step(nn.Module):
    """One call of a model as a function of tensors alone, for streaming without grad.

    Args:
        model: whose parameters it shares; computes as in evaluation, whatever the model's mode.
    """

    def __init__(self, model: CompressiveTransformer) -> None:
        super().__init__()
        self.model: CompressiveTransformer = share(model)
        self.eval()

    def forward(
        self,
        tokens: Tensor,  # [B, T]
        lengths: Tensor,  # [B]
        state: Sequence[Tensor],
    ) -> Tensor:
        """Continues every row's stream by its first `lengths` tokens.

        Args:
            tokens: int64 [B, T], T >= 1, each in [0, vocab_size).
            lengths: int64 [B], from 0 to T; what stands behind is padding.
            state: the memory's tensors, written in place: those of ``ctx.state.TENSORS`` for every
                layer, layer by layer, and last ``seen`` and ``rewindable``.

        Returns:
            Logits [B, vocab_size] behind the last token of every row, zero for a row without.
        """
        *rings, seen, rewindable = state
        of_layer = [list(rings[i : i + len(TENSORS)]) for i in range(0, len(rings), len(TENSORS))]
        memory = Memory(self.model.spec, seen, rewindable, of_layer)
        with torch.no_grad():
            logits: Tensor
            logits, after = self.model(tokens, memory, lengths=lengths, last_only=True)
            # What wraps a block may copy what the block is given; then the copies were written.
            for mine, made in zip(state, leaves(after), strict=True):
                if mine is not made:
                    mine.copy_(made)
        return logits


def program(
    model: CompressiveTransformer, *, compressed_dtype: torch.dtype | None = None
) -> torch.export.ExportedProgram:
    """A :class:`Step` of the model as a graph, for any number of rows and tokens.

    Args:
        model: on the CPU. Its parameters are those of the graph, not copies.
        compressed_dtype: what compressed slots are stored as, see
            :meth:`ctx.CompressiveTransformer.init_memory`.

    Raises:
        TypeError, ValueError: the model is none that can be exported.
    """
    return _exported(_checked(model, "ctx.export.program"), compressed_dtype)


def save(
    model: CompressiveTransformer,
    path: str | os.PathLike[str],
    *,
    compressed_dtype: torch.dtype | None = None,
) -> None:
    """Compiles :func:`program` with AOTInductor, for this machine's processor, into one file.

    A package's ``run`` takes tokens, lengths and the memory's tensors in one list and returns the
    logits, as :meth:`Step.forward` says; all contiguous, on the CPU. It raises for a token or a
    length out of range, and has then written nothing; shapes and dtypes are the caller's business.
    The loader's ``get_metadata()`` has, besides torch's own entries,

    - ``ctx_format``: :data:`FORMAT`;
    - ``ctx_vocab_size``;
    - ``ctx_state``: of every tensor of the memory its dtype and its sizes, as
      ``"float32 Bx4x104x16 ... int64 B int64 B"`` with B for the number of rows. Zeros of them are
      an empty memory.

    Takes a C++ compiler and about a minute. A package runs with the minor version of torch that it
    was made with, and with the operators of this version of ctx. It is written whole or not at all.

    Args:
        model: on the CPU; its parameters are copied into the package.
        path: ends with ``.pt2``.
        compressed_dtype: as in :func:`program`.

    Raises:
        TypeError, ValueError: the model is none that can be exported, or `path` none of a package.
        OSError: the file cannot be written.
    """
    where = "ctx.export.save"
    model = _checked(model, where)
    target = Path(os.fsdecode(_check.path(path, where)))
    if target.suffix != ".pt2" or target.is_dir():
        got = f"the folder {str(target)!r}" if target.is_dir() else repr(str(target))
        raise ValueError(f"{where}: path must be a file that ends with .pt2, got {got}")
    # Beside the file whose place the package takes; made before the minute that compiling takes.
    with (
        tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own calls of itself
        memory = model.init_memory(1, compressed_dtype=compressed_dtype)
        metadata = {
            "ctx_format": str(FORMAT),
            "ctx_vocab_size": str(model.config.vocab_size),
            "ctx_state": _described(leaves(memory)),
        }
        made = torch._inductor.aoti_compile_and_package(
            _exported(model, compressed_dtype),
            package_path=str(Path(folder, target.name)),
            inductor_configs={
                "aot_inductor.metadata": metadata,
                # In the order of the model: the clock advances when every layer has written.
                "reorder_for_peak_memory": False,
            },
        )
        os.replace(made, target)


def _checked(model: Any, where: str) -> CompressiveTransformer:
    """The model, if a graph can be made of it.

    Raises:
        TypeError, ValueError: it is none, or not on the CPU, or does not hold plain tensors.
    """
    if not isinstance(model, CompressiveTransformer):
        raise TypeError(
            f"{where}: model must be a ctx.CompressiveTransformer, got {type(model).__name__}"
        )
    for name, parameter in model.named_parameters():
        if hasattr(type(parameter), "__tensor_flatten__"):
            got = type(parameter).__name__
            raise TypeError(f"{where}: model must have plain tensors, got {got} as {name}")
        if parameter.device.type != "cpu":
            raise ValueError(f"{where}: model must be on the CPU, got {parameter.device} of {name}")
    return model


def _exported(
    model: CompressiveTransformer, compressed_dtype: torch.dtype | None
) -> torch.export.ExportedProgram:
    # A size of one in the example would be a constant of the graph; others hold for one, too.
    rows, count = 2, 3
    state = leaves(model.init_memory(rows, compressed_dtype=compressed_dtype))
    tokens = torch.zeros(rows, count, dtype=torch.int64)
    some = {0: torch.export.Dim("B", min=1)}
    shapes = ({**some, 1: torch.export.Dim("T", min=1)}, some, [some] * len(state))
    example = (tokens, torch.full((rows,), count), state)
    with torch.no_grad():  # else a change of mode is part of the graph, which cannot be saved
        return torch.export.export(Step(model), example, dynamic_shapes=shapes, strict=False)


def _described(state: Sequence[Tensor]) -> str:
    """The entry ``ctx_state`` of a package's metadata."""
    words = []
    for x in state:
        sizes = "x".join(["B", *map(str, x.shape[1:])])
        words.append(f"{str(x.dtype).removeprefix('torch.')} {sizes}")
    return " ".join(words)
