"""Compressors fitted to a frozen model: see :func:`ctx.hf.fit`."""

from __future__ import annotations

from ctx.hf.fitting.run import fit

__all__ = ["fit"]
