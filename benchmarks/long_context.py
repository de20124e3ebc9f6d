"""An existing model on long texts: what a bounded memory keeps of the full cache.

Windows of a held-out text (perplexity, KL, share of the gap between window + sinks and the full
cache that is closed), a passage that repeats after a distance, and facts that are asked for later:
each under the full cache, window + sinks, and memories of as many slots, with mean slots by budget
and ratio and with the compressors of files that `python -m ctx fit` wrote. A slot budget is the
most that a query ever attends to.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._harness import arguments, positive, start
from benchmarks._report import Report, bars
from ctx.hf.evaluation import (
    Candidate,
    Comparison,
    Samples,
    candidates,
    compare,
    grid,
    needles,
    repeats,
    tables,
    windows,
)
from ctx.recipes.progress import Progress

__all__ = ["main"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
QUICK: dict[str, Any] = {
    "slots": [20, 24], "ratios": [2, 4], "probed": 24, "windows": 3, "length": 120, "begin": 60,
    "distances": [20, 60], "passage": 16, "passages": 2, "needles": 1, "chunk": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model, text to tokens, and a text's tokens."""

    model: Any
    encode: Callable[[str], Sequence[int]]
    ids: Tensor  # int64 [N]
    bos: int | None


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = start(parser, argv)
    if args.quick:
        vars(args).update(QUICK)
    elif args.model is None or args.text is None:
        parser.error("--model and --text must be given, or --quick")
    subject = _random() if args.quick and args.model is None else _read(args)
    chosen = _candidates(args, subject.model)
    probed = [one for one in chosen if _is_probed(one, args)]
    report = Report("long_context", args)
    _windows(report, subject, chosen, args)
    for distance in args.distances:
        _repeats(report, subject, probed, distance, args)
    _needles(report, subject, probed, args)
    return report.finish(_draw)


def _parser() -> argparse.ArgumentParser:
    parser = arguments("benchmarks.long_context", str(__doc__).splitlines()[0])
    add, many = parser.add_argument, {"type": positive, "nargs": "+", "metavar": "N"}
    add("--model", type=Path, metavar="DIR", help="a Hugging Face model's folder, or a .gguf's")
    add("--text", type=Path, metavar="FILE", help="a UTF-8 text that nothing was fitted to")
    add("--compressor", type=Path, nargs="+", default=[], metavar="FILE", help="of `ctx fit`")
    add("--slots", **many, default=[256, 512, 1024], help="budgets")
    add("--ratios", type=positive, nargs="*", default=[2, 4, 8], metavar="N", help="of mean slots")
    add("--distance", choices=("slot", "token"), default="slot", help="of all but files")
    add("--probed", type=positive, default=512, help="the budget for passages and needles")
    add("--windows", type=positive, default=8, help="of the text")
    add("--length", type=positive, default=4096, help="tokens of a window, and of a needle's text")
    add("--begin", type=positive, default=2048, help="the first token of a window that counts")
    add("--distances", **many, default=[300, 1000, 3000], help="tokens before a passage repeats")
    add("--passage", type=positive, default=256, help="its tokens")
    add("--passages", type=positive, default=8, help="for each distance")
    add("--needles", type=positive, default=4, help="for each depth")
    add("--chunk", type=positive, default=512, help="tokens per call")
    add("--dtype", choices=DTYPES, default="float32", help="of the model")
    return parser


def _read(args: argparse.Namespace) -> Subject:
    import ctx.hf

    model, tokenizer = ctx.hf.load_model(args.model, DTYPES[args.dtype])

    def encode(text: str) -> Sequence[int]:
        found: Sequence[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return found

    first, bos = tokenizer("a").input_ids[0], tokenizer.bos_token_id
    ids = torch.tensor(encode(args.text.read_text(encoding="utf-8")))
    return Subject(model, encode, ids, bos if first == bos else None)


def _random() -> Subject:
    """A tiny model of bytes with random weights, and the source of a module."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    text = Path(argparse.__file__).read_bytes()[:2000]
    return Subject(model, lambda part: list(part.encode()), torch.tensor(list(text)), None)


def _candidates(args: argparse.Namespace, model: Any) -> list[Candidate]:
    """The full cache, then what is compared: the grid of mean slots, and files."""
    entries = dict.fromkeys((slots, ratio) for slots in args.slots for ratio in args.ratios)
    made = grid.candidates_of(entries, distance=args.distance)
    known = {one.name for one in made}
    for path in args.compressor:
        from ctx.hf import load_compressors

        found = load_compressors(path, model)
        name = f"window + sinks, {found.mean_slots}"
        if found.distance != args.distance:
            name += f", {found.distance}"
        if name not in known:
            known.add(name)
            sizes = {"distance": found.distance, "name": name}
            made.append(candidates.window_and_sinks(found.mean_slots, **sizes))
        made.append(candidates.fitted(path.stem, found, baseline=name))
    return made


def _is_probed(one: Candidate, args: argparse.Namespace) -> bool:
    files = {path.stem for path in args.compressor}
    window = f"window + sinks, {args.probed}"
    return one.attention is None or one.name in files | {window} or one.baseline == window


def _windows(
    report: Report, subject: Subject, chosen: list[Candidate], args: argparse.Namespace
) -> None:
    cut = windows.cut(subject.ids, args.windows, args.length, bos=subject.bos)
    with Progress("windows", args.windows * args.length * len(chosen)) as progress:
        samples = windows.score(
            subject.model,
            cut,
            chosen,
            start=args.begin,
            chunk=args.chunk,
            advance=progress.advance,
        )
    lines = _rows(report, "windows", samples)
    entries = dict.fromkeys((slots, ratio) for slots in args.slots for ratio in args.ratios)
    if entries:
        print("\n\n" + grid.table(lines, entries))
    for line in lines:
        if line.name in {path.stem for path in args.compressor} and line.share is not None:
            what = f"{line.name}: share of the gap closed"
            report.at_least("4", what, line.share.value, 0.4)


def _repeats(
    report: Report,
    subject: Subject,
    probed: list[Candidate],
    distance: int,
    args: argparse.Namespace,
) -> None:
    texts = repeats.build(subject.ids, distance, passage=args.passage, count=args.passages)
    total = len(probed) * sum(map(len, texts))
    with Progress(f"passages, {distance}", total) as progress:
        options = {"passage": args.passage, "chunk": args.chunk, "advance": progress.advance}
        samples = repeats.score_repeats(subject.model, texts, probed, **options)
    _rows(report, f"passage again after {distance}", samples)


def _needles(
    report: Report, subject: Subject, probed: list[Candidate], args: argparse.Namespace
) -> None:
    length = max(args.length, 200)
    options: dict[str, Any] = {"length": length, "per_depth": args.needles}
    with Progress("needles", len(DEPTHS) * args.needles * length * len(probed)) as progress:
        parts = []
        for depth in DEPTHS:
            seed = round(100 * depth)
            probes = needles.build(
                subject.encode, subject.ids, depths=[depth], seed=seed, **options
            )
            advance = progress.advance
            parts.append(
                needles.score_probes(
                    subject.model, probes, probed, chunk=args.chunk, advance=advance
                )
            )
            _rows(report, f"needle at {depth:g}", parts[-1], show=False)
    _rows(report, "needles", Samples.join(parts))


def _rows(report: Report, what: str, samples: Samples, *, show: bool = True) -> list[Comparison]:
    """A row of the report for each candidate; and a table of its own."""
    lines = compare(samples)
    for line in lines:
        report.row(
            what=what,
            who=line.name,
            perplexity=line.perplexity,
            loss=line.loss,
            over_full=line.over_full,
            gap_closed=line.share,
            KL=line.kl,
            KL_gap_closed=line.kl_share,
            likeliest=line.hits,
        )
    if show:
        print(f"\n\n{what}, {lines[0].samples} samples:\n\n{tables.markdown(lines)}", flush=True)
    return lines


def _draw(figure: Any, report: Report) -> None:
    left, right = figure.subplots(1, 2)
    rows = [row for row in report.rows if row["what"] == "windows"]
    bars(left, [row["who"] for row in rows], [row["perplexity"] for row in rows], "perplexity")
    distances = report.args.distances
    again = [[row for row in report.rows if row["what"] == f"passage again after {distance}"]
             for distance in distances]  # fmt: skip
    for lines in zip(*again, strict=True):
        losses, errors = zip(*((row["loss"].value, row["loss"].error or 0) for row in lines),
                             strict=True)  # fmt: skip
        right.errorbar(distances, losses, errors, marker="o", capsize=2, label=lines[0]["who"])
    right.set(xlabel="tokens before a passage repeats", ylabel="nats per token, second time")
    right.legend(fontsize=7)


if __name__ == "__main__":
    sys.exit(main())
