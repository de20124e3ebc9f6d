"""Compressive Transformer memory: exact recent pairs, compressed older ones, at constant size.

:class:`Schedule` decides what a memory holds, and :class:`AttentionSettings` how queries attend to
it. :class:`Memory` is what it holds. :class:`KVMemory` streams keys and values through it,
:class:`Session` those of many streams that come and go;
:class:`CompressiveAttention` and :class:`CompressiveTransformer` train and stream with it, and
:mod:`ctx.reference` is the same function in plain PyTorch.
"""

from ctx import (
    _load,  # first: explains what is wrong if the compiled part does not fit
    compression,
    export,
    losses,
    padding,
    positions,
    reference,
    rows,
)
from ctx._load import cmake_prefix_path
from ctx.attention import CompressiveAttention
from ctx.kv_memory import KVMemory
from ctx.memory import Memory
from ctx.schedule import Schedule
from ctx.session import Session
from ctx.settings import AttentionSettings
from ctx.spec import Spec
from ctx.transformer import CompressiveTransformer, CompressiveTransformerConfig

__version__ = _load.version

__all__ = [
    "AttentionSettings",
    "CompressiveAttention",
    "CompressiveTransformer",
    "CompressiveTransformerConfig",
    "KVMemory",
    "Memory",
    "Schedule",
    "Session",
    "Spec",
    "__version__",
    "cmake_prefix_path",
    "compression",
    "export",
    "losses",
    "padding",
    "positions",
    "reference",
    "rows",
]
