"""Compressors: groups of c pairs become one slot each, per kv head.

``Mean``, ``Max``, ``Conv``, ``Dilated`` and ``MostUsed`` are the compression functions of Rae et
al. 2019 (arXiv:1911.05507, section 3.2). Deviation: the paper compresses hidden states with one
network for all heads, here every kv head compresses its own (un-rotated) keys and values.
"""

from ctx.compression.base import Compressor
from ctx.compression.conv import Conv
from ctx.compression.custom import Custom
from ctx.compression.dilated import Dilated
from ctx.compression.gated import Gated
from ctx.compression.max import Max
from ctx.compression.mean import Mean
from ctx.compression.most_used import MostUsed
from ctx.compression.registry import (
    COMPRESSORS,
    as_compressor,
    check_kernel,
    make_compressor,
    register,
)

__all__ = [
    "COMPRESSORS",
    "Compressor",
    "Conv",
    "Custom",
    "Dilated",
    "Gated",
    "Max",
    "Mean",
    "MostUsed",
    "as_compressor",
    "check_kernel",
    "make_compressor",
    "register",
]
