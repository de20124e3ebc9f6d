"""`python -m ctx`: train, evaluate and generate with a byte-level Compressive Transformer."""
