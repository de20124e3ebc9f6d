"""Several processes and generation: a sharded model (FSDP2, a split embedding) or a replicated one
continues a text as its hand-written loop does."""

import os
import socket
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import ctx
from pairwise import pairwise

ROWS, LENGTH, NEW = 2, 70, 3

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def make(**changed):
    torch.manual_seed(0)
    sizes = {"window": 8, "compressed": 6, "ratio": 4, "segment": 8}
    settings = {"vocab_size": 50, "embed_dim": 32, "num_layers": 2, "num_heads": 4, **sizes}
    return ctx.CompressiveTransformer(ctx.CompressiveTransformerConfig(**{**settings, **changed}))


def shard(model, policy):
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def text(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 50, (ROWS, LENGTH), generator=generator)


def by_hand(model, tokens):
    """The likeliest tokens, by the plainest loop there is, and the memory that it ends with."""
    memory, out = model.init_memory(ROWS), []
    with torch.no_grad():
        for chunk in (tokens[:, :64], tokens[:, 64:]):
            logits, memory = model(chunk, memory)
        for step in range(NEW):
            out.append(logits[:, -1].argmax(-1))
            if step < NEW - 1:
                logits, memory = model(out[-1][:, None], memory)
    return torch.stack(out, 1), memory


def check(model, tokens):
    """`generate` and `stream` draw what the loop draws, and stream into the memory passed."""
    wanted, held = by_hand(model, tokens)
    for method in (model.generate, lambda *a, **o: torch.stack(list(model.stream(*a, **o)), 1)):
        assert torch.equal(method(tokens, NEW, temperature=0), wanted)
        memory = model.init_memory(ROWS)
        given = [layer.tensors for layer in memory]
        assert torch.equal(method(tokens, NEW, temperature=0, memory=memory), wanted)
        for layer, same, other in zip(memory, given, held, strict=True):
            assert layer["seen"].tolist() == [LENGTH + NEW - 1] * ROWS
            for name, tensor in layer.tensors.items():
                assert tensor is same[name]
                assert torch.equal(tensor, other[name]), name
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def train_step(model, tokens):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    logits, _ = model(tokens[:, :-1])
    cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def generates(rank, changed, low, registered):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if low else MixedPrecisionPolicy()
    model, tokens = make(**changed), text(rank)
    plain = make(**changed).generate(tokens, NEW, temperature=0)
    shard(model, policy)
    if registered:
        register_fsdp_forward_method(model, "generate")
        register_fsdp_forward_method(model, "stream")
    if not low:  # the first thing that the sharded model does
        assert torch.equal(model.generate(tokens, NEW, temperature=0), plain)
    check(model, tokens)
    train_step(model, tokens)
    check(model, tokens)
    check(model.with_memory(compressed=0), tokens)  # the twin is sharded, not registered
    train_step(model, tokens)  # generation leaves nothing that training could not take
    assert all(x.full_tensor().isfinite().all() for x in model.state_dict().values())


def replicated(rank):
    """DDP: trains a step, generates by the module inside, trains again; ranks stay equal."""
    model, tokens = DistributedDataParallel(make()), text(rank)
    before = model.module.generate(tokens, NEW, temperature=0)
    assert torch.equal(before, by_hand(model.module, tokens)[0])
    train_step(model, tokens)
    check(model.module, tokens)
    train_step(model, tokens)
    for parameter in model.parameters():
        everyone = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, parameter.detach())
        assert all(torch.equal(everyone[0], other) for other in everyone)


def split_embedding(ranks):
    """A tied table whose rows lie on several ranks (tensor parallelism) is asked, not read."""
    model, tokens = make(), text(0)
    wanted, drawn = model(tokens)[0], model.generate(tokens, NEW, temperature=0)
    mesh = init_device_mesh("cpu", (ranks,))
    plan = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    parallelize_module(model, mesh, {"embedding": plan})
    torch.testing.assert_close(model(tokens)[0], wanted)
    assert torch.equal(model.generate(tokens, NEW, temperature=0), drawn)


MODELS = [{}, {"tied": False, "norm": "layer", "compressor": "most_used", "position": None}]
CASES = pairwise(MODELS, (False, True), (False, True))


def worker(rank, ranks, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    for changed, low, registered in CASES:
        print(f"rank {rank}: {changed}, bfloat16: {low}, registered: {registered}", flush=True)
        generates(rank, changed, low, registered)
    replicated(rank)
    split_embedding(ranks)
    dist.barrier()
    # Gloo's threads may abort where the other end is gone first: nobody leaves early, nor unwinds.
    time.sleep(1)
    os._exit(0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sharded_model_generates(ranks):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(ranks, port), nprocs=ranks)
