"""Peer: caches of `transformers` on a model of SmolLM2-135M's shape, one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ctx
from benchmarks._harness import interleave
from benchmarks._report import Report

__all__ = ["INSTALL", "TITLE", "measure"]

TITLE = "transformers"
INSTALL = 'pip install "transformers>=5.17,<6"'
RATIO = 4


@torch.inference_mode()
def measure(report: Report) -> None:
    """Seconds per token at growing contexts, float32, random weights, batch 1.

    `ctx, exact` keeps every token, as DynamicCache does; `ctx` sees as many slots as the sliding
    window, half of them compressed. Caches are filled with random pairs instead of a prompt: what
    they hold does not change the time.
    """
    quick = report.args.quick
    slots, contexts = (32, (32, 64)) if quick else (1024, (512, 4096, 16384))
    shape = {
        "vocab_size": 256 if quick else 49152,
        "hidden_size": 36 if quick else 576,
        "intermediate_size": 96 if quick else 1536,
        "num_hidden_layers": 2 if quick else 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 1 << 17,
        "tie_word_embeddings": True,
    }
    llama, mistral = _theirs(shape, None), _theirs(shape, slots)
    ours = _ours(shape, slots)
    for context in contexts:
        exact = ours.with_memory(window=context + 4096, compressed=0)
        candidates = {
            f"ctx, {slots // 2} + {slots // 2} slots": _our_step(ours, context),
            "ctx, exact": _our_step(exact, context),
            "DynamicCache": _their_step(llama, context),
            f"DynamicCache, sliding window {slots}": _their_step(mistral, context),
        }
        times = interleave(candidates, report.args.repeat, multiple=RATIO)
        fastest = next(iter(times.values())).median
        for name, timing in times.items():
            report.row(
                peer=TITLE,
                what=f"{context} tokens of context",
                who=name,
                time=timing,
                **{"ctx is faster by": timing.median / fastest},
            )


def _ours(shape: dict[str, Any], slots: int) -> ctx.CompressiveTransformer:
    config = ctx.CompressiveTransformerConfig(
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        num_layers=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        mlp_dim=shape["intermediate_size"],
        window=slots // 2,
        compressed=slots // 2,
        ratio=RATIO,
    )
    return ctx.CompressiveTransformer(config).eval()


def _our_step(model: ctx.CompressiveTransformer, context: int) -> Callable[[], Tensor]:
    memory = model.init_memory(1)
    for ring in memory.rings:
        for part in filter(Tensor.is_floating_point, ring):
            part.normal_()
    memory.seen.fill_(context)
    memory.rewindable.fill_(1)
    token = torch.zeros(1, 1, dtype=torch.int64)

    def step() -> Tensor:
        logits: Tensor = model(token, memory)[0]
        return logits

    return step


def _theirs(shape: dict[str, Any], window: int | None) -> Any:
    """Llama's model; Mistral's is the same with a sliding window."""
    import transformers

    if window is None:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    else:
        config = transformers.MistralConfig(**shape, sliding_window=window)
        model = transformers.MistralForCausalLM(config)
    return model.eval()


def _their_step(model: Any, context: int) -> Callable[[], Tensor]:
    from transformers import DynamicCache

    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        pair = torch.randn(2, 1, config.num_key_value_heads, context, head_dim)
        cache.update(*pair.unbind(0), layer)
    token = torch.zeros(1, 1, dtype=torch.int64)

    def step() -> Tensor:
        logits: Tensor = model(token, past_key_values=cache, use_cache=True).logits
        return logits

    return step
