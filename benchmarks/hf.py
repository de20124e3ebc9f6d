"""An existing model: what a decoded token costs with ctx.hf, by how many tokens have been seen.

A model of SmolLM2-135M's shape with random weights (or one in a folder), one token at a time:
`CompressiveCache` under "ctx", with half its slots compressed, and with compressed=0 and all tokens
exact, against `DynamicCache` under "sdpa". Caches are filled with random pairs instead of a prompt:
what they hold does not change the time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks._harness import arguments, interleave, positive, start
from benchmarks._report import Report

__all__ = ["main"]

RATIO, MIB = 4, 1 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments("benchmarks.hf", str(__doc__).splitlines()[0])
    parser.add_argument("--model", help="folder of a model; default: SmolLM2's shape")
    parser.add_argument("--slots", type=positive, default=1024, help="window + compressed")
    tokens: dict[str, Any] = {"type": positive, "nargs": "+"}
    parser.add_argument("--tokens", **tokens, default=[1024, 16384, 100_000], help="of a stream")
    parser.add_argument("--compared", **tokens, default=[1024, 16384], help="kept by the others")
    args = start(parser, argv)
    if args.quick:
        args.slots, args.tokens, args.compared = 32, [64, 200], [64]
    report = Report("hf", args)
    with torch.inference_mode():
        for name, dtype in DTYPES.items():
            _measure(report, name, dtype, args)
    return report.finish(_draw)


def _measure(report: Report, name: str, dtype: torch.dtype, args: Any) -> None:
    model = _model(args).to(dtype)
    half = args.slots // 2
    ours, exact, theirs = f"ctx, {half} + {half} slots", "ctx, all exact", "DynamicCache, sdpa"

    def measured(candidates: dict[tuple[str, int], Any]) -> dict[tuple[str, int], float]:
        """Medians of these, which take turns."""
        steps = {f"{who}, {tokens}": step for (who, tokens), (step, _) in candidates.items()}
        timings = interleave(steps, args.repeat, multiple=RATIO).values()
        for (who, tokens), timing in zip(candidates, timings, strict=True):
            size = candidates[who, tokens][1]
            report.row(dtype=name, tokens=tokens, who=who, time=timing, MiB=size / MIB)
        return dict(zip(candidates, (timing.median for timing in timings), strict=True))

    first, last = args.tokens[0], args.tokens[-1]
    times = measured({(ours, tokens): _ours(model, tokens, half, half) for tokens in args.tokens})
    what = f"{name}, time at {last} tokens seen / at {first}"
    report.at_most("3", what, times[ours, last] / times[ours, first], 1.1)
    for tokens in args.compared:
        times = measured(
            {
                (ours, tokens): _ours(model, tokens, half, half),
                (exact, tokens): _ours(model, tokens, tokens + 4096, 0),
                (theirs, tokens): _theirs(model, tokens),
            }
        )
        full = times[theirs, tokens]
        what = f"{name}, {tokens} tokens seen, times as fast as DynamicCache with sdpa"
        if tokens == args.compared[-1]:
            report.at_least("3", what, full / times[ours, tokens], 4.0)
        report.at_least("3", f"{what}, all tokens exact", full / times[exact, tokens], 1.0)


def _model(args: Any) -> Any:
    import transformers

    if args.model is not None:
        return transformers.AutoModelForCausalLM.from_pretrained(args.model).eval()
    quick = args.quick
    config = transformers.LlamaConfig(
        vocab_size=256 if quick else 49152,
        hidden_size=36 if quick else 576,
        intermediate_size=96 if quick else 1536,
        num_hidden_layers=2 if quick else 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=1 << 17,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def _step(model: Any, attention: str, cache: Any) -> Callable[[], Tensor]:
    token = torch.zeros(1, 1, dtype=torch.int64)

    def step() -> Tensor:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        logits: Tensor = model(token, past_key_values=cache, use_cache=True).logits
        return logits

    return step


def _ours(
    model: Any, tokens: int, window: int, compressed: int
) -> tuple[Callable[[], Tensor], int]:
    """A step behind so many tokens, and the bytes of the cache."""
    import ctx.hf

    ctx.hf.register()
    cache = ctx.hf.CompressiveCache(model.config, window=window, compressed=compressed, ratio=RATIO)
    step = _step(model, "ctx", cache)
    step()
    schedules = [layer.schedule.resized(window=window) for layer in cache.memory.spec.layers]
    state = cache.memory.resized(schedules).state_dict()  # rings grow where nothing is compressed
    for name, part in state.items():
        if isinstance(part, Tensor) and part.is_floating_point() and not name.endswith("mass"):
            part.normal_()
    state["seen"].fill_(tokens)
    state["ctx.hf.CompressiveCache"] = {"columns": tokens, "unpadded": tokens}
    cache.load_state_dict(state)
    step()
    if int(cache.memory.seen) != tokens + 1:
        raise RuntimeError(f"the memory must have seen {tokens + 1} tokens, got {cache.memory}")
    return step, cache.nbytes


def _theirs(model: Any, tokens: int) -> tuple[Callable[[], Tensor], int]:
    """The same with transformers' own cache."""
    from transformers import DynamicCache

    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = DynamicCache(config=config)
    size = 0
    for layer in range(config.num_hidden_layers):
        shape = (2, 1, config.num_key_value_heads, tokens, width)
        pair = torch.randn(shape, dtype=model.dtype)
        size += pair.nbytes
        cache.update(*pair.unbind(0), layer)
    return _step(model, "sdpa", cache), size


def _draw(figure: Any, report: Report) -> None:
    for axes, name in zip(figure.subplots(1, 2).flat, DTYPES, strict=True):
        rows = [row for row in report.rows if row["dtype"] == name]
        for who in dict.fromkeys(row["who"] for row in rows):
            own = [row for row in rows if row["who"] == who]
            times = [1e3 * row["time"].median for row in own]
            axes.plot([row["tokens"] for row in own], times, "o", label=who)
        axes.set(xscale="log", xlabel="tokens seen", ylabel="ms per token", title=name)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)


if __name__ == "__main__":
    sys.exit(main())
