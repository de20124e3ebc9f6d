"""A Hugging Face model that talks for ever, at constant memory.

Turn after turn a text goes on, far beyond the length that the model's configuration names: some
tokens from outside, and some that the model generates. The two lines that make it possible are
those between the rules.

    python examples/python/endless_generation.py [--model DIR]

runs with a tiny model of random weights, without network, and prints for every turn how many tokens
have been seen, what the cache holds, what transformers' own cache would hold, and the time per
token. At the end the whole text is read at once into a new cache, which then says the same of the
next token. With a folder of a real model (and its tokenizer) the text means something.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import transformers

import ctx.hf

PROMPT = "And it came to pass in those days, that there went out a decree"


def small_model() -> Any:
    """A Llama of random weights, made for texts of 256 tokens."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def full_bytes(model: Any, tokens: int) -> int:
    """What a cache of all tokens takes."""
    config = model.config
    heads = config.num_key_value_heads or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * tokens * model.dtype.itemsize


@torch.inference_mode()
def main() -> None:
    """Prints a line for every turn, and how far two ways of reading the text are apart."""
    parser = argparse.ArgumentParser(description="Generation without end, at constant memory.")
    parser.add_argument("--model", help="folder of a model; default: a tiny one of random weights")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=100, help="generated in every turn")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    if args.model is None:
        model, text = small_model(), torch.randint(1, 512, (1, 100))
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        text = tokenizer(PROMPT, return_tensors="pt").input_ids

    # ----------------------------------------------------------------------------------------------
    ctx.hf.register()
    model.set_attn_implementation("ctx")
    # ----------------------------------------------------------------------------------------------

    sizes: dict[str, int] = {"window": 64, "compressed": 32, "ratio": 4}
    cache = ctx.hf.CompressiveCache(model.config, **sizes)
    said = transformers.GenerationConfig(
        max_new_tokens=args.tokens, do_sample=True, pad_token_id=0, use_cache=True
    )
    for turn in range(args.turns):
        if turn:  # what the other side says: here, the beginning once more
            text = torch.cat([text, text[:, :50]], 1)
        before, begin = cache.get_seq_length(), time.perf_counter()
        text = model.generate(
            text, attention_mask=torch.ones_like(text), past_key_values=cache,
            generation_config=said,
        )  # fmt: skip
        seen = cache.get_seq_length()
        spent = (time.perf_counter() - begin) / (seen - before)
        print(
            f"turn {turn + 1}: {seen} tokens seen, {cache.nbytes} bytes "
            f"(all of them: {full_bytes(model, seen)}), {1e3 * spent:.2f} ms a token"
        )
    if args.model is not None:
        print(tokenizer.decode(text[0, -args.tokens :]))

    anew = ctx.hf.CompressiveCache(model.config, **sizes)
    at_once = model(text, past_key_values=anew, use_cache=True, logits_to_keep=1).logits
    gone_on = model(text[:, -1:], past_key_values=cache, use_cache=True).logits
    error = (at_once - gone_on).abs().max().item()
    print(f"largest difference to reading the text at once: {error:.1e}")


if __name__ == "__main__":
    main()
