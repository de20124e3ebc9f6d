"""The law of the compressive memory in plain PyTorch, written to be read.

Same names as `ctx`, one token at a time, importing nothing but torch. It defines what the kernels
compute, and tests compare the two. It is slow, and nothing in `ctx` calls it.
"""

from .attention import compressive_attention
from .compression import (
    COMPRESSORS,
    Slot,
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
from .scores import working_dtype
from .sequence import attend
from .settings import Settings

__all__ = [
    "COMPRESSORS",
    "KVMemory",
    "Relative",
    "Rotary",
    "Schedule",
    "Settings",
    "Slot",
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
