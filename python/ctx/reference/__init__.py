"""The law of the compressive memory in plain PyTorch, written to be read.

Same names as `ctx`, one token at a time, importing nothing but torch: read it to know what the
kernels compute, compare against it to know that they do. It is slow, and nothing in `ctx` calls it.
"""

from .attention import attend, compressive_attention, working_dtype
from .compression import (
    COMPRESSORS,
    compress_group,
    conv,
    dilated,
    gated,
    initial_parameters,
    maximum,
    mean,
    most_used,
)
from .losses import attention_reconstruction
from .memory import KVMemory
from .positions import Relative, alibi_slopes, sinusoid
from .rotary import Rotary
from .schedule import Schedule

__all__ = [
    "COMPRESSORS",
    "KVMemory",
    "Relative",
    "Rotary",
    "Schedule",
    "alibi_slopes",
    "attend",
    "attention_reconstruction",
    "compress_group",
    "compressive_attention",
    "conv",
    "dilated",
    "gated",
    "initial_parameters",
    "maximum",
    "mean",
    "most_used",
    "sinusoid",
    "working_dtype",
]
