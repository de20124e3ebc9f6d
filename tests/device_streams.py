"""Steps of one token over fixed input tensors on a device: a memory's, a layer's, a model's."""

from dataclasses import dataclass
from functools import partial

import torch

import ctx

B, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2, 4, 2, 32, 50
WIDTH = HEADS * HEAD_DIM
# Fifty tokens evict and compress; slots are overwritten.
SIZES = {"window": 12, "compressed": 6, "ratio": 2, "segment": 4, "sinks": 2}


@dataclass
class Stream:
    """`step(*inputs, **rows)` of a KVMemory; of a module `step(input, memory, **rows)`."""

    memory: object
    inputs: list
    step: object

    def call(self, **rows):
        """One step; reads `inputs`, writes to `memory`."""
        if isinstance(self.memory, ctx.Memory):
            return self.step(*self.inputs, self.memory, **rows)[0]
        return self.step(*self.inputs, **rows)

    def draw(self, generator):
        """Inputs of another token, drawn on the CPU."""
        return [
            torch.randint(0, VOCAB, x.shape, generator=generator)
            if x.dtype == torch.int64
            else torch.randn(x.shape, generator=generator).to(x.dtype)
            for x in self.inputs
        ]

    def feed(self, drawn):
        for x, new in zip(self.inputs, drawn, strict=True):
            x.copy_(new)

    def held(self):
        """A copy of what the memory holds, as `restore` takes it."""
        state = self.memory.state_dict()
        return {name: x.clone() if torch.is_tensor(x) else x for name, x in state.items()}

    def restore(self, held):
        self.memory.load_state_dict(held)


def kv_stream(device, compressor="mean", dtype=torch.float32, settings=None, **options):
    """ctx.KVMemory.step."""
    settings = ctx.AttentionSettings(schedule=ctx.Schedule(**SIZES), **settings or {})
    if settings.position == "alibi":
        options["alibi_slopes"] = ctx.positions.alibi_slopes(HEADS)
    if settings.position == "relative":
        with torch.device(device):
            options["relative"] = ctx.positions.Relative(HEADS, HEAD_DIM, 8)
        for parameter in options["relative"].parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    memory = ctx.KVMemory(
        settings,
        *(B, KV_HEADS, HEAD_DIM),
        compressor=compressor,
        max_rewind=4,
        dtype=dtype,
        device=device,
        **options,
    )
    heads = (HEADS, KV_HEADS, KV_HEADS)
    inputs = [torch.zeros(B, n, 1, HEAD_DIM, dtype=dtype, device=device) for n in heads]
    return Stream(memory, inputs, memory.step)


def layer_stream(device, **options):
    """ctx.CompressiveAttention, without grad."""
    layer = ctx.CompressiveAttention(
        embed_dim=WIDTH, num_heads=HEADS, num_kv_heads=KV_HEADS, device=device, **SIZES, **options
    )
    return Stream(layer.init_memory(B), [torch.zeros(B, 1, WIDTH, device=device)], layer)


def model_stream(device, **options):
    """ctx.CompressiveTransformer, without grad."""
    config = ctx.CompressiveTransformerConfig(
        vocab_size=VOCAB,
        embed_dim=WIDTH,
        num_layers=3,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        **SIZES,
        **options,
    )
    with torch.device(device):
        model = ctx.CompressiveTransformer(config).eval()
    tokens = torch.zeros(B, 1, dtype=torch.int64, device=device)
    return Stream(model.init_memory(B), [tokens], model)


_INT8 = {"dtype": torch.bfloat16, "compressed_dtype": torch.int8}
STREAMS = {
    "memory": kv_stream,
    "memory, conv, bfloat16": partial(kv_stream, compressor="conv", dtype=torch.bfloat16),
    "memory, max, int8 slots": partial(kv_stream, compressor="max", **_INT8),
    "memory, gated, mass": partial(
        kv_stream, compressor="gated", settings={"slot_mass": True, "compressed_bias": "none"}
    ),
    "memory, most_used": partial(kv_stream, compressor="most_used"),
    "memory, alibi": partial(kv_stream, settings={"position": "alibi", "distance": "token"}),
    "memory, relative": partial(kv_stream, settings={"position": "relative"}),
    "layer": layer_stream,
    "layer, dilated": partial(layer_stream, compressor="dilated"),
    "layer, of inputs": partial(layer_stream, memory_content="hidden"),
    "layer, alibi": partial(layer_stream, position="alibi", compressed_bias="log_ratio"),
    "layer, relative": partial(layer_stream, position="relative"),
    "model": model_stream,
    "model, by layer": partial(model_stream, compressor="mean", max_rewind=8),
}


def rows_of(kind, device, tokens=1):
    """What a call says of its rows: one of its options, or none."""
    if kind == "lengths":
        return {"lengths": torch.tensor([0, tokens]).to(device)}
    if kind == "reset_at":
        return {"reset_at": torch.tensor([[True], [False]]).expand(B, tokens).to(device)}
    if kind == "mask":
        return {"mask": torch.tensor([[False], [True]]).expand(B, tokens).to(device)}
    return {}


def trained(layer, x):
    """A layer's calls under grad, one after another, each with its backward; the memory at the
    end."""
    carried = None
    for kind in ("plain", "lengths", "reset_at", "mask"):
        y, carried = layer(
            x.detach().requires_grad_(), carried, **rows_of(kind, x.device, x.shape[1])
        )
        y.sum().backward()
    return carried
