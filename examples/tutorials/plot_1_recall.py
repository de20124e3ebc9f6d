"""
Associative recall
==================

Does a memory remember what a window of the same size forgets? Pairs of a key and a value come
first, then many keys whose values are asked for. Two small models are trained on it. Both may hold
as many entries for each query: the one 22 exact tokens, the other 8 exact tokens and 14 slots of
four tokens each, which reach 64 tokens back.

``python -m ctx recall`` does the same with larger sizes and every compressor; its table is in
:doc:`/results/recall`.
"""

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

import ctx
from ctx.recipes.recall_task import KEYS, VALUES, RecallTask

torch.manual_seed(0)
torch.set_num_threads(1)

# %%
# The task: 8 pairs, then 64 queries. The distance of a query is how many tokens its pair lies back.

task = RecallTask(pairs=8, length=64)
drawn = task.draw(1, torch.Generator().manual_seed(0))
print("tokens", drawn.tokens[0, :20].tolist(), "...")
print("answers", drawn.answers[0, :8].tolist(), "... at distances", drawn.distances[0, :8].tolist())

# %%
# The models differ in their memory alone.

sizes = {
    "window 22": {"window": 22, "compressed": 0},
    "window 8 + 14 slots of 4": {"window": 8, "compressed": 14, "compressor": "gated"},
}


def make(size):
    torch.manual_seed(0)
    config = ctx.CompressiveTransformerConfig(
        vocab_size=KEYS + VALUES,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        ratio=4,
        rotary_base=100.0,
        tied=False,
        **size,
    )
    return ctx.CompressiveTransformer(config)


models = {name: make(size) for name, size in sizes.items()}
for name, model in models.items():
    print(
        f"{name}: at most {model.schedule.max_slots} entries, reach {model.schedule.reach} tokens"
    )

# %%
# Training: fresh sequences at every step, in short lessons first. The queries that a model cannot
# answer, because the pair lies beyond its reach, do not count.


def train(model, steps, batch=32):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    lessons = task.lessons()
    for step in range(steps):
        place = min(len(lessons) - 1, int(len(lessons) * 1.5 * step / steps))
        lesson, times = lessons[place]
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 30, 2.5 * (1 - step / steps))
        drawn = lesson.draw(times * batch, generator)
        logits, _ = model(drawn.tokens)
        logits = logits[:, -lesson.length :]
        known = drawn.distances <= model.schedule.reach
        loss = cross_entropy(logits[known], drawn.answers[known])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


for name, model in models.items():
    print(f"{name}: loss {train(model, 200):.3f} at the end")

# %%
# Measured as a stream, three tokens per call: the numbers are the same however a stream is cut.


@torch.inference_mode()
def measure(model, rows=512):
    drawn = task.draw(rows, torch.Generator().manual_seed(1))
    memory, guesses = model.init_memory(rows), []
    for tokens in drawn.tokens.split(3, 1):
        logits, memory = model(tokens, memory)
        guesses.append(logits.argmax(-1))
    right = torch.cat(guesses, 1)[:, -task.length :] == drawn.answers
    ends = range(0, task.farthest + 8, 8)
    cells = [(drawn.distances > a) & (drawn.distances <= a + 8) for a in ends]
    return [a + 4 for a in ends], [right[c].float().mean().item() * 100 for c in cells]


figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, model in models.items():
    distances, right = measure(model)
    axes.plot(distances, right, marker="o", label=name)
    print(f"{name}: " + " ".join(f"{x:.0f}" for x in right))
    axes.axvline(model.schedule.reach, color="grey", linestyle=":", linewidth=1)
axes.set(xlabel="distance of the pair, tokens", ylabel="right answers, %", ylim=(0, 103))
_ = axes.legend()

# %%
# The dotted lines are the reach of either memory. Behind its window the first model guesses (chance
# is one in 32); the second answers from its slots.
