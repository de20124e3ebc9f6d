"""What a Hugging Face configuration says of a model's attention, and which models are refused."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["head_dim_of", "is_interleaved", "layers_of", "rope_parameters_of"]

#: Configuration entries of models whose keys are not what this library takes them for.
_REFUSED = {
    "is_encoder_decoder": "an encoder and a decoder",
    "alibi": "ALiBi",
    "qk_rope_head_dim": "latent attention (MLA)",
    "num_kv_shared_layers": "keys and values that layers share",
    "kv_sharing_modes": "keys and values that layers share",
    "attention_k_eq_v": "values that are keys",
}
#: Model types whose full-attention layers do not rotate at all, though others do.
_UNROTATED = ("cohere2", "cohere2_moe", "exaone4")

#: Model types that rotate channels (0, n / 2), … together in code of another name.
_HALVES = ("gpt_oss",)


def layers_of(config: Any, where: str) -> list[Any]:
    """transformers' own cache layers for the model, None in place of those of full attention.

    Raises:
        ValueError: the model is one whose keys are not plain rotated keys.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    for name, what in _REFUSED.items():
        if getattr(config, name, None):
            raise ValueError(f"{where}: config must be of a model without {what}, got {name}")
    rotated = getattr(config, "no_rope_layers", None)
    if config.model_type in _UNROTATED or (rotated and not all(rotated)):
        raise ValueError(
            f"{where}: config must be of a model that rotates the keys of all its full-attention "
            f"layers, got {config.model_type!r}"
        )
    layers = DynamicCache(config=config).layers
    found = [None if type(layer) is DynamicLayer else layer for layer in layers]
    if None not in found:
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise ValueError(f"{where}: config must have full-attention layers, got only {kinds}")
    return found


def rope_parameters_of(config: Any, where: str) -> Mapping[str, Any]:
    """The rotary parameters of the full-attention layers.

    Raises:
        ValueError: the model has none: its positions are learned, or of another kind.
    """
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, Mapping) and "full_attention" in parameters:
        parameters = parameters["full_attention"]
    if not isinstance(parameters, Mapping):
        raise ValueError(
            f"{where}: config must be of a model with rotary positions (rope_parameters); learned "
            f"absolute positions end with the trained length, got {config.model_type!r}"
        )
    if "mrope_section" in parameters:
        raise ValueError(
            f"{where}: rope_parameters must have one position per token, got mrope_section"
        )
    return parameters


def head_dim_of(config: Any) -> int:
    """Channels of a key."""
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def is_interleaved(config: Any, given: bool | None, where: str) -> bool:
    """Whether channels (0, 1), (2, 3), … are rotated together, and not (0, n / 2), ….

    A configuration does not say it; the model's own ``rotate_half`` does.

    Raises:
        ValueError: it has none, or another rotation, and ``given`` is None.
    """
    if given is not None:
        return given
    if config.model_type in _HALVES:
        return False
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        rotate_half = importlib.import_module(module).rotate_half
        turned = rotate_half(torch.tensor([[0.0, 1.0, 2.0, 3.0]], device="cpu")).tolist()
    except (ImportError, AttributeError):
        turned = None
    if turned == [[-2.0, -3.0, 0.0, 1.0]]:
        return False
    if turned == [[-1.0, 0.0, -3.0, 2.0]]:
        return True
    raise ValueError(
        f"{where}: rotary_interleaved must say which channels of a key are rotated together, "
        f"as {config.model_type!r} has no rotate_half that tells, got None"
    )
