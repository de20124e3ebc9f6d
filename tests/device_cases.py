"""Random cases of what the operators compute, run on one device and compared with another.

A case is a random law, memory and stream of calls: rows of unequal length, documents that begin
inside a call, reads without writes, rows taken back; and differentiable calls of a layer over its
memory with all gradients. All numbers are drawn on the CPU and moved, so that every device gets the
same ones.
"""

import random
import sys

import torch

import ctx

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
COMPRESSORS = ["mean", "max", "conv", "dilated", "gated", "most_used"]


def draw_settings(r):
    position = r.choice(["rotary", "rotary", "alibi", "relative", None])
    rotary = position == "rotary"
    slot_mass = r.random() < 0.4
    return ctx.AttentionSettings(
        schedule=ctx.Schedule(
            r.randint(0, 9),
            r.choice([0, 1, 3, 6]),
            r.randint(1, 4),
            r.randint(1, 4),
            r.randint(0, 3),
        ),
        position=position,
        distance=r.choice(["slot", "token"]),
        rotary_dim=r.choice([None, 2, 4]) if rotary else None,
        rotary_interleaved=rotary and r.random() < 0.3,
        attention_factor=r.choice([1.0, 1.3]) if rotary else 1.0,
        keys=r.choice(["plain", "rotated"]) if rotary else "plain",
        compressed_bias="none" if slot_mass else r.choice(["none", "log_ratio"]),
        slot_mass=slot_mass,
        logit_softcap=r.choice([None, 2.0]),
    )


def numbers(generator, dtype, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


class Case:
    """One random case; `run` gives what it computes on a device, by name."""

    device = torch.device("cpu")

    def __init__(self, seed):
        self.seed = seed
        r = random.Random(seed)
        self.settings = draw_settings(r)
        self.dtype = r.choice(
            [torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16]
        )
        narrow = [] if self.dtype == torch.float64 else [torch.int8]
        self.slots = r.choice([None, None, *narrow])
        self.compressor = r.choice(COMPRESSORS)
        self.batch, self.kv_heads = r.randint(1, 3), r.randint(1, 2)
        self.heads = self.kv_heads * r.choice([1, 2, 4])
        self.head_dim, self.value_dim = r.choice([4, 8, 16]), r.choice([4, 8])
        self.max_rewind = r.choice([1, 2, 5])
        self.calls = [
            (r.choice([1, 1, 2, 5, 9]), r.choice(["plain", "lengths", "documents"]))
            for _ in range(r.randint(2, 5))
        ]

    def __str__(self):
        return f"case {self.seed}: {vars(self)}"

    def memory(self, generator):
        kind = {"compressor": self.compressor, "value_dim": self.value_dim}
        if self.settings.position == "alibi":
            kind["alibi_slopes"] = numbers(generator, torch.float64, self.heads).abs()
        if self.settings.position == "relative":
            kind["relative"] = self.relative(generator)
        memory = ctx.KVMemory(
            self.settings,
            *(self.batch, self.kv_heads, self.head_dim),
            **kind,
            max_rewind=self.max_rewind,
            dtype=self.dtype,
            compressed_dtype=self.slots,
            device=self.device,
        )
        self.draw(generator, memory.compressor, 0.3)
        return memory

    def draw(self, generator, module, scale):
        """Random parameters, on the device."""
        for parameter in module.parameters():
            drawn = numbers(generator, parameter.dtype, *parameter.shape) * scale
            parameter.data = drawn.to(self.device)

    def relative(self, generator):
        made = ctx.positions.Relative(self.heads, self.head_dim, 8)
        self.draw(generator, made, 0.3)
        return made

    def rows(self, generator, tokens, kind):
        """lengths and reset_at of a call."""
        if kind == "lengths":
            lengths = torch.randint(0, tokens + 1, (self.batch,), generator=generator)
            return lengths.to(self.device), None
        if kind == "documents":
            begins = torch.rand(self.batch, tokens, generator=generator) < 0.2
            return None, begins.to(self.device)
        return None, None

    def pairs(self, generator, tokens):
        sizes = [
            (self.heads, self.head_dim),
            (self.kv_heads, self.head_dim),
            (self.kv_heads, self.value_dim),
        ]
        drawn = [numbers(generator, self.dtype, self.batch, h, tokens, d) for h, d in sizes]
        return [x.to(self.device) for x in drawn]

    def run(self, device="cpu"):
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(self.seed)
        memory = self.memory(generator)
        made = {}
        for i, (tokens, kind) in enumerate(self.calls):
            q, k, v = self.pairs(generator, tokens)
            rows = self.rows(generator, tokens, kind)
            out, weights = memory.step(q, k, v, *rows, return_region_weights=True)
            made |= {f"out {i}": out, f"weights {i}": weights}
            back = int(memory.rewindable.min())
            if back > 0 and self.compressor != "most_used":
                made[f"read {i}"] = memory.attend(q[:, :, -min(back, tokens) :])
                memory.rewind(1)
        # Of the rings only what is shown counts, and the calls above show it.
        made |= {"seen": memory.seen.clone(), "rewindable": memory.rewindable.clone()}
        return made | self.gradients(generator)

    def gradients(self, generator):
        settings = self.settings
        if settings.keys == "rotated":
            return {}
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        layer = ctx.CompressiveAttention(
            settings,
            embed_dim=self.heads * self.head_dim,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            compressor=self.compressor,
            max_rewind=self.max_rewind,
            device=self.device,
            dtype=wide,
        )
        self.draw(generator, layer, 0.2)
        carried, made = None, {}
        for i, (tokens, kind) in enumerate(self.calls[:3]):
            x = numbers(generator, wide, self.batch, tokens, self.heads * self.head_dim)
            x = x.to(self.device).requires_grad_()
            lengths, reset_at = self.rows(generator, tokens, kind)
            mask = None
            if lengths is not None:
                mask = torch.arange(tokens, device=self.device) < lengths[:, None]
            y, carried = layer(x, carried, mask=mask, reset_at=reset_at)
            y.backward(numbers(generator, wide, *y.shape).to(self.device))
            made |= {f"layer {i}": y.detach(), f"grad of x {i}": x.grad}
            carried = carried.clone()
        named = {f"grad of {name}": p.grad for name, p in layer.named_parameters()}
        return made | {name: grad for name, grad in named.items() if grad is not None}


def differences(case, want, got):
    """What two runs of a case do not agree in, one line each."""
    if want.keys() != got.keys():
        return [f"{want.keys() ^ got.keys()}"]
    wrong = []
    for name, x in want.items():
        bound = TOLERANCE[case.dtype]
        if "grad" in name or "layer" in name:
            bound = TOLERANCE[torch.float64 if case.dtype == torch.float64 else torch.float32]
            bound *= max(1.0, float(x.abs().max())) if x.numel() else 1.0
        if case.slots is not None:
            bound = max(bound, 2e-2)
        difference = (x.double() - got[name].cpu().double()).abs()
        if x.numel() and not float(difference.max()) <= bound:
            wrong.append(f"{name}: {float(difference.max()):.3g} above {bound:.3g}")
    return wrong


def asked_cases(asked):
    """What a program is asked for: [cases] [first case], forty from the first on if nothing."""
    count, first = (int(x) for x in [*asked, *("40", "0")[len(asked) :]])
    return [Case(seed) for seed in range(first, first + count)]


def failures_of(name, cases, want, device="cpu"):
    """How many cases on a device do not give what is wanted; each is printed."""
    failures = 0
    for case, expected in zip(cases, want, strict=True):
        try:
            wrong = differences(case, expected, case.run(device))
        except Exception as error:  # one case must not hide the others
            wrong = [repr(error)]
        failures += bool(wrong)
        if wrong:
            print(case, *wrong, sep="\n  ")
    print(f"{name}: {len(cases)} cases, {failures} failures")
    return failures


def main():
    device, *asked = sys.argv[1:]
    cases = asked_cases(asked)
    return failures_of(device, cases, [case.run() for case in cases], device) > 0


if __name__ == "__main__":
    sys.exit(main())
