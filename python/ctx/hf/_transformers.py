"""transformers, where this library finds one that it works with."""

from __future__ import annotations

from typing import Any

__all__ = ["cache_classes"]


def cache_classes() -> tuple[Any, Any]:
    """transformers' own Cache and CacheLayerMixin.

    Raises:
        ImportError: transformers is missing, or of another version; the message says which.
    """
    wanted = 'transformers must be installed, >=5.17 and <6 (pip install "transformers>=5.17,<6")'
    try:
        import transformers
        from transformers.cache_utils import Cache, CacheLayerMixin
    except ImportError as error:
        raise ImportError(f"ctx.hf: {wanted}, got {error}") from error
    major, minor = map(int, transformers.__version__.split(".")[:2])
    if not (major == 5 and minor >= 17):
        raise ImportError(f"ctx.hf: {wanted}, got {transformers.__version__}")
    return Cache, CacheLayerMixin
