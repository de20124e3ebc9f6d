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

import ctx
from ctx.recipes.recall_settings import RecallSettings
from ctx.recipes.recall_training import measure, train

torch.set_num_threads(1)

# %%
# The task: 8 pairs, then 64 queries. The distance of a query is how many tokens its pair lies back.

settings = RecallSettings(
    pairs=8, length=64, window=8, slots=14, ratio=4, compressor="max", steps=400
)
task = settings.task
drawn = task.draw(1, torch.Generator().manual_seed(0))
print("tokens   ", drawn.tokens[0, :20].tolist(), "...")
print("answers  ", drawn.answers[0, :8].tolist(), "...")
print("distances", drawn.distances[0, :8].tolist(), "...")

# %%
# The models differ in their memory alone.

models = {}
for one in settings.contestants():
    torch.manual_seed(0)
    models[one.name] = model = ctx.CompressiveTransformer(one.config)
    most, reach = model.schedule.max_slots, model.schedule.reach
    print(f"{one.name}: at most {most} entries for a query, reach {reach} tokens")

# %%
# Training: fresh sequences at every step, short lessons first, until 99 % of what a model can see
# is answered or the steps are done. Queries whose pair lies beyond the reach do not count.

for name, model in models.items():
    held, reach = model.schedule.window, model.schedule.reach
    spans = [(1, held)] if held == reach else [(1, 22), (23, reach)]
    steps = train(
        model,
        task,
        spans,
        steps=settings.steps,
        batch=settings.batch,
        lr=settings.lr,
        generator=torch.Generator().manual_seed(0),
        advance=lambda step, text: None,
    )
    print(f"{name}: {steps} steps")

# %%
# Measured as a stream of fresh sequences, seven tokens per call: the numbers are the same however a
# stream is cut.

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, model in models.items():
    tally = measure(model, task, 512, torch.Generator().manual_seed(1))
    cells = [(first, min(first + 7, task.farthest)) for first in range(1, task.farthest, 8)]
    right = [100 * tally.accuracy(*cell) for cell in cells]
    axes.plot([sum(cell) / 2 for cell in cells], right, marker="o", label=name)
    axes.axvline(model.schedule.reach, color="grey", linestyle=":", linewidth=1)
    print(f"{name}: " + " ".join(f"{share:.0f}" for share in right))
axes.set(xlabel="distance of the pair, tokens", ylabel="right answers, %", ylim=(0, 103))
axes.legend()

# %%
# The dotted lines are the reach of either memory. Behind its window the first model guesses (chance
# is one in 32); the second answers from its slots as well.
