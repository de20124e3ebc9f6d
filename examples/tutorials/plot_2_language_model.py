"""
A small language model, and where its attention goes
====================================================

A byte-level model of three layers is trained on sources of the Python standard library, streamed,
and asked what share of its attention goes to sinks, compressed slots and the window in each layer.

``python -m ctx train`` does it with larger sizes, checkpoints and an evaluation;
:doc:`/results/text` has what came out.
"""

import math
import sysconfig
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

import ctx

torch.manual_seed(0)
torch.set_num_threads(1)

# %%
# The text: eight streams side by side, each read in order; the end is held out.

folder = Path(sysconfig.get_path("stdlib"))
names = ("argparse", "ast", "calendar", "codecs", "copy", "csv", "datetime", "difflib", "inspect")
raw = b"".join(folder.joinpath(f"{name}.py").read_bytes() for name in names)
text = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
held_out, text = text[-4000:], text[:-4000]
streams = text[: len(text) // 8 * 8].view(8, -1)
print(f"{text.numel():,} bytes to train on")

# %%
# The model: a window of 32 exact tokens, 32 slots of 4 tokens, 2 sinks. The bias of slots starts at
# -4, so that slots are nearly out of attention until the model has a use for them.

config = ctx.CompressiveTransformerConfig(
    vocab_size=256,
    embed_dim=96,
    num_layers=3,
    num_heads=4,
    window=32,
    compressed=32,
    ratio=4,
    segment=16,
    sinks=2,
    compressor="conv",
    compressed_bias_init=-4.0,
)
model = ctx.CompressiveTransformer(config)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, reach {model.schedule.reach}")

# %%
# Training: every call goes on where the one before ended; the memory is a constant for it.

steps, length, peak = 450, 96, 4e-3
optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
memory, losses = None, []
for step in range(steps):
    start = step * length % (streams.shape[1] - length - 1)
    chunk = streams[:, start : start + length + 1]
    optimizer.param_groups[0]["lr"] = peak * min(1, step / 20, 1.5 * (1 - step / steps))
    logits, memory = model(chunk[:, :-1], memory)
    loss = cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item() / math.log(2))
print(f"bits per byte: {losses[0]:.2f} at first, {sum(losses[-10:]) / 10:.2f} at last")

# %%
# Streamed over the held-out text, in short calls, at constant memory. What is printed is about the
# same weights; whether a memory is worth its slots only a model can say that was trained without
# one (``python -m ctx train --compare``).

model.eval()


@torch.inference_mode()
def bits_per_byte(model):
    memory, total = model.init_memory(1), 0.0
    for piece, target in zip(held_out[:-1].split(37), held_out[1:].split(37), strict=True):
        logits, memory = model(piece[None], memory)
        total += cross_entropy(logits[0], target, reduction="sum").item()
    return total / math.log(2) / (len(held_out) - 1), memory


bits, carried = bits_per_byte(model)
without, _ = bits_per_byte(model.with_memory(compressed=0))
print(f"{bits:.3f} bits per byte; the same weights without slots {without:.3f}")
print(f"{carried.seen.item()} tokens seen, {carried.nbytes:,} bytes")

# %%
# Where attention goes: the shares of all queries, averaged over heads and tokens.

with torch.inference_mode():
    _, _, weights = model(held_out[None, :1000], return_region_weights=True)
shares = weights[:, 0, :, 200:].mean((1, 2)).numpy()  # [layers, 3], once slots are full
figure, axes = plt.subplots(figsize=(5, 2.6), layout="constrained")
picture = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
axes.set_xticks(range(3), ["sinks", "slots", "window"])
axes.set_yticks(range(len(shares)), [f"layer {i}" for i in range(len(shares))])
for layer, row in enumerate(shares):
    for region, share in enumerate(row):
        color = "black" if share > 0.6 else "white"
        axes.text(region, layer, f"{share:.2f}", ha="center", va="center", color=color)
figure.colorbar(picture, label="share of attention")

# %%
# And what it writes:

prompt = torch.tensor([list(b"def __init__(self")])
made = model.generate(prompt, 120, temperature=0.6, seed=0)
print(bytes(made[0].tolist()).decode(errors="replace"))
