"""Compressors fitted to a frozen model: see :func:`ctx.hf.fit`."""
