"""Trains, evaluates and generates with a byte-level Compressive Transformer, and measures what its
memory is worth; streams texts through existing models. Each COMMAND has a --help of its own."""
