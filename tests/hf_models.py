"""Tiny random Hugging Face decoders for tests, and what is compared of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ctx.hf

transformers = pytest.importorskip("transformers", minversion="5.17", reason="needs transformers")

VOCABULARY = 61
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPED = {**_LLAMA, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip

#: {name: (what begins the names of its classes, settings)}.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "qwen2": ("Qwen2", {**_GROUPED, "use_sliding_window": False}),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 16}),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": None}),
    "gpt_neox": ("GPTNeoX", {**_LLAMA, "rotary_pct": 0.5}),
    "gemma": ("Gemma", _GEMMA),
    "gemma2": ("Gemma2", {**_GEMMA, "sliding_window": 8, "attn_logit_softcapping": 0.5,
                          "query_pre_attn_scalar": 3}),
    "gpt_oss": ("GptOss", {
        **_GEMMA, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {**_YARN, "original_max_position_embeddings": 64}}),
    "phi": ("Phi", {**_GROUPED, "partial_rotary_factor": 0.5}),
    "cohere": ("Cohere", _GROUPED),  # interleaved
    "linear": ("Llama", {**_GROUPED, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama3": ("Llama", {**_GROUPED, "rope_parameters": _LLAMA3}),
    "yarn": ("Llama", {**_GROUPED, "rope_parameters": {
        **_YARN, "original_max_position_embeddings": 64}}),
}  # fmt: skip


def model_of(family: str, attention: str = "ctx", dtype: torch.dtype = torch.float32) -> Any:
    """A model of that family, always the same one, with scores that are not nearly uniform."""
    ctx.hf.register()
    name, settings = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    model = model.to(dtype)
    model.set_attn_implementation(attention)
    return model


def tokens(rows: int, count: int, seed: int = 0) -> Tensor:
    """Random tokens without padding, [rows, count]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, count), generator=generator)


def left_padded(x: Tensor, *padding: int) -> tuple[Tensor, Tensor]:
    """Rows with so many columns of padding on the left, and their mask."""
    x, mask = x.clone(), torch.ones_like(x)
    for row, count in enumerate(padding):
        x[row, :count], mask[row, :count] = 0, 0
    return x, mask


@torch.no_grad()
def logits_of(
    model: Any, cache: Any, x: Tensor, cut: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """Logits of a text that is fed in pieces of `cut` tokens."""
    outs = []
    for begin in range(0, x.shape[1], cut or x.shape[1]):
        part = slice(begin, begin + (cut or x.shape[1]))
        arguments = {}
        if mask is not None:
            arguments["attention_mask"] = mask[:, : part.stop]
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, part]
        outs.append(model(x[:, part], past_key_values=cache, use_cache=True, **arguments).logits)
    return torch.cat(outs, 1)


def generated(model: Any, cache: Any, x: Tensor, count: int = 12, **options: Any) -> Tensor:
    """Greedy continuation, with the prompt."""
    options = {"do_sample": False, "max_new_tokens": count, **options}
    made: Tensor = model.generate(x, past_key_values=cache, **options)
    return made


def full_cache(model: Any) -> Any:
    """The cache that models have of themselves."""
    return transformers.DynamicCache(config=model.config)


def exact_cache(model: Any) -> Any:
    """One whose window holds all that tests feed."""
    return ctx.hf.CompressiveCache(model.config, window=160, compressed=8)


def small_cache(model: Any, **options: Any) -> Any:
    """One that compresses soon."""
    options = {"window": 8, "compressed": 6, "ratio": 4, "sinks": 2, **options}
    return ctx.hf.CompressiveCache(model.config, **options)
