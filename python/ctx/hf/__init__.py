"""Existing models with a bounded memory: a cache for Hugging Face transformers, and the attention
that reads it.

    cache = ctx.hf.CompressiveCache(model.config, window=512, compressed=512, ratio=4)
    ctx.hf.register()
    model.set_attn_implementation("ctx")
    model.generate(**inputs, past_key_values=cache)

transformers (5.17 or later, below 6) is imported when the first of these names is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctx.hf.attention import register
    from ctx.hf.cache import CompressiveCache
    from ctx.hf.compressors import FittedCompressors, load_compressors
    from ctx.hf.fitting.run import fit
    from ctx.hf.loading import load_model

__all__ = [
    "CompressiveCache",
    "FittedCompressors",
    "fit",
    "load_compressors",
    "load_model",
    "register",
]

#: {name: the module that has it}.
_MODULES = {
    "CompressiveCache": "cache",
    "FittedCompressors": "compressors",
    "fit": "fitting.run",
    "load_compressors": "compressors",
    "load_model": "loading",
    "register": "attention",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"ctx.hf.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'ctx.hf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
