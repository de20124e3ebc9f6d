"""The sizes of the Compressive Transformer's own language models (Rae et al. 2019,
arXiv:1911.05507, section 5), for `ctx train --preset`. None of them has been trained here.

Layers, windows, memories, ratios, learning rates and their schedules are the paper's. Widths are in
it for enwik8 and WikiText-103 (as Transformer-XL's, Dai et al. 2019, arXiv:1901.02860). What
is not in it, or not in `ctx`, is said in `Preset.unlike`, which `ctx train --param-count` prints.
"""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["PRESETS", "Preset"]


@dataclasses.dataclass(frozen=True)
class Preset:
    """One model of the paper: settings, and what is known of the original."""

    vocab_size: int  # the paper's; `ctx train` itself reads bytes
    model: dict[str, Any]  # by name in CompressiveTransformerConfig
    run: dict[str, Any]  # by name in TrainSettings
    published: str  # how many parameters are said to be in it, and where
    unlike: tuple[str, ...]  # where this model is another one than the paper's


_MODEL: dict[str, Any] = {
    "compressor": "conv",
    "compressor_grad": "aux",
    "aux_loss": "reconstruction",
    "memory_content": "hidden",
    "position": "relative",
    "compressed_bias": "none",
    "mlp": "gelu",
    "norm": "layer",
    "bias": True,
}
# Adam without decay of weights; the learning rate rises to 3e-4 and falls back to 1e-6.
_RUN: dict[str, Any] = {
    "lr": 3e-4,
    "final_lr": 1e-6 / 3e-4,
    "weight_decay": 0.0,
    "clip": 0.1,
    "update_every": 4,
    "update_every_after": 60_000,
}
_CHARACTERS = {**_RUN, "warmup": 4_000, "steps": 104_000}
_WORDS = {**_RUN, "warmup": 16_000, "steps": 516_000}

_UNLIKE = (
    "every layer has biases u and v of its own for its positions, as Transformer-XL has untied",
    "norms stand before the branches, not behind; GELU, not ReLU; AdamW's betas are 0.9, 0.95",
    "dropout is off, since the paper's is not known here: --dropout",
)

PRESETS: dict[str, Preset] = {
    "enwik8": Preset(
        vocab_size=256,
        model={**_MODEL, "embed_dim": 1024, "num_layers": 24, "num_heads": 8, "mlp_dim": 3072,
               "window": 768, "compressed": 1152, "ratio": 3, "segment": 768},
        run={**_CHARACTERS, "length": 768, "batch": 32},
        published="277M of Transformer-XL with these layers and widths; compressors are beside it",
        unlike=(*_UNLIKE, "the batch, 32, is not in the paper",
                "evaluate as the paper does with `ctx eval --compressed 3072`"),
    ),
    "wikitext103": Preset(
        vocab_size=267_735,
        model={**_MODEL, "embed_dim": 1024, "num_layers": 18, "num_heads": 16, "mlp_dim": 4096,
               "window": 512, "compressed": 512, "ratio": 4, "segment": 512},
        run={**_WORDS, "length": 512, "batch": 128},
        published="257M of Transformer-XL with these layers and widths and an adaptive "
        "embedding; compressors are beside it",
        unlike=(*_UNLIKE, "one embedding of full width for every word, not adaptive inputs and an "
                "adaptive softmax, which hold a small part of its parameters",
                "evaluate as the paper does with `ctx eval --window 500 --compressed 1500`"),
    ),
    "pg19": Preset(
        vocab_size=32_000,
        model={**_MODEL, "embed_dim": 1024, "num_layers": 36, "num_heads": 16, "mlp_dim": 4096,
               "window": 512, "compressed": 512, "ratio": 2, "segment": 512},
        run={**_WORDS, "length": 512, "batch": 512},
        published="none: the paper gives layers and memories only",
        unlike=(*_UNLIKE, "width, heads and MLP are not in the paper: WikiText-103's are taken",
                "whether the embedding is tied is not in the paper: it is here"),
    ),
}  # fmt: skip
