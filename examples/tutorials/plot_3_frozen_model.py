"""
A frozen model with fitted compressors
======================================

A model of Hugging Face that was trained without a memory gets one, and its slots are fitted to it;
no weight of it changes. The model here is a small Llama that is trained on the spot to recall
values of keys (:doc:`plot_1_recall`), as nothing is downloaded while this site is built. The same
with SmolLM2-135M on a novel, measured with errors, is in :doc:`/existing-models`.
"""

import matplotlib.pyplot as plt
import torch
import transformers
from torch.nn.functional import cross_entropy

import ctx.hf
from ctx.recipes.recall_task import KEYS, VALUES, RecallTask, Tally

torch.manual_seed(0)
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

# %%
# The model, with full attention: two layers, trained on 8 pairs and 40 queries.

task = RecallTask(pairs=8, length=40)
config = transformers.LlamaConfig(
    vocab_size=KEYS + VALUES,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=128,
    rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    eos_token_id=None,
)
model = transformers.LlamaForCausalLM(config)


def train(model, steps=360, peak=3e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    lessons, place, share = task.lessons(), 0, 0.0
    for step in range(steps):
        if share > 0.98 and place < len(lessons) - 1:
            place, share = place + 1, 0.0
        lesson, times = lessons[place]
        optimizer.param_groups[0]["lr"] = peak * min(1, step / 50, 2.5 * (1 - step / steps))
        drawn = lesson.draw(times * 32, generator)
        logits = model(drawn.tokens, use_cache=False).logits[:, -lesson.length :]
        loss = cross_entropy(logits.flatten(0, 1), drawn.answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share = 0.8 * share + 0.2 * (logits.argmax(-1) == drawn.answers).float().mean().item()
    print(f"lesson {place + 1} of {len(lessons)}, {share:.0%} right")


train(model)
model.eval()

# %%
# The fit: every query may attend to at most 32 entries: slots of two tokens, window, and tokens
# that wait for their group to fill. Each layer takes the share of slots with which its outputs are
# nearest to those of the full cache.

texts = list(task.draw(64, torch.Generator().manual_seed(2)).tokens)
sizes = {"slots": 32, "ratio": 2, "sinks": 0, "distance": "token"}
taken = {"excerpts": 48, "validation": 16, "excerpt_tokens": task.tokens, "queries": 16}
fitted = ctx.hf.fit(model, texts, **sizes, **taken, steps=60)
for layer, schedule in enumerate(fitted.schedules):
    print(f"layer {layer}: {schedule.compressed} slots, window {schedule.window}")

# %%
# Four caches. All but the full one hold at most 32 entries for any query.

ctx.hf.register()
model.set_attn_implementation("ctx")
shared = {"sinks": 0, "distance": "token", "segment": 1}
caches = {
    "full cache": lambda: ctx.hf.CompressiveCache(config, window=128, compressed=0, **shared),
    "window": lambda: ctx.hf.CompressiveCache(config, window=31, compressed=0, ratio=1, **shared),
    "mean slots": lambda: ctx.hf.CompressiveCache(
        config, window=14, compressed=16, ratio=2, **shared
    ),
    "fitted slots": lambda: ctx.hf.CompressiveCache(config, compressor=fitted),
}


@torch.inference_mode()
def measure(cache):
    drawn = task.draw(256, torch.Generator().manual_seed(1))
    guesses = model(drawn.tokens, past_key_values=cache).logits.argmax(-1)[:, -task.length :]
    tally = Tally(task.farthest)
    tally.add(guesses == drawn.answers, drawn.distances)
    return tally


cells = [(first, min(first + 5, task.farthest)) for first in range(1, task.farthest, 6)]
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, make in caches.items():
    tally = measure(make())
    right = [100 * tally.accuracy(*cell) for cell in cells]
    axes.plot([sum(cell) / 2 for cell in cells], right, marker="o", label=name)
    print(f"{name:14}" + " ".join(f"{share:4.0f}" for share in right))
axes.set(xlabel="distance of the pair, tokens", ylabel="right answers, %", ylim=(0, 103))
axes.legend()

# %%
# Behind its window the first bounded cache has nothing to answer from. A mean of a key and its
# value lets the model tell them apart about half of the time; a gate that was fitted to what the
# model looks for keeps most of it. Nothing is left behind the reach of the slots.
