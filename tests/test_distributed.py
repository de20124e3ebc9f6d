"""Two processes over gloo: every rank has streams, and so a memory, of its own."""

import copy
import os
import socket
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import ctx

RANKS, ROWS, STEPS, LENGTH = 2, 2, 4, 24

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def make():
    torch.manual_seed(0)
    sizes = {"window": 8, "compressed": 6, "ratio": 4, "segment": 8}
    config = ctx.CompressiveTransformerConfig(
        vocab_size=50, embed_dim=32, num_layers=2, num_heads=4, compressed_bias="log_ratio", **sizes
    )
    return ctx.CompressiveTransformer(config)


def text():
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 50, (RANKS * ROWS, STEPS * LENGTH + 1), generator=generator)


def train(model, parameters, tokens):
    """A few steps with carried memory; the losses and the last memory."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    memory, losses = None, []
    for step in range(STEPS):
        chunk = tokens[:, step * LENGTH : (step + 1) * LENGTH + 1]
        logits, memory = model(chunk[:, :-1], memory)
        loss = cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, memory


def alone():
    """The same steps in one process, over the streams of all ranks."""
    model = make()
    losses, memory = train(model, model.parameters(), text())
    return model, losses, memory


def check(losses, memory, weights, rank):
    """A rank's weights are those of one process; its memory is that of its own streams."""
    model, _, whole = alone()
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), atol=1e-5, rtol=1e-4)
    for layer, expected in zip(memory, whole, strict=True):
        assert layer["seen"].tolist() == [STEPS * LENGTH] * ROWS
        for name in layer.tensors:
            torch.testing.assert_close(layer[name], expected[name][mine], atol=1e-5, rtol=1e-4)
    assert len(losses) == STEPS
    keys = memory[0]["window_keys"]
    everyone = [torch.empty_like(keys) for _ in range(RANKS)]
    dist.all_gather(everyone, keys.contiguous())
    assert not torch.equal(everyone[0], everyone[1])


def data_parallel(rank):
    model = DistributedDataParallel(make())  # buffers are broadcast, memories are none
    mine = text()[rank * ROWS : (rank + 1) * ROWS]
    losses, memory = train(model, model.parameters(), mine)
    check(losses, memory, {n: p.detach() for n, p in model.module.named_parameters()}, rank)


def sharded(rank):
    model = make()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    mine = text()[rank * ROWS : (rank + 1) * ROWS]
    losses, memory = train(model, model.parameters(), mine)
    weights = {name: x.full_tensor() for name, x in model.state_dict().items()}
    check(losses, memory, weights, rank)
    with torch.no_grad():  # and it streams
        held = copy.deepcopy(memory)
        logits, held = model(mine[:, :5], held)
    assert logits.shape == (ROWS, 5, 50)
    assert held[0]["seen"].tolist() == [STEPS * LENGTH + 5] * ROWS


def worker(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    for work in (data_parallel, sharded):
        print(f"rank {rank}: {work.__name__}", flush=True)
        work(rank)
    dist.barrier()
    # Gloo's threads may abort where the other end is gone first: nobody leaves early, nor unwinds.
    time.sleep(1)
    os._exit(0)


def test_two_processes():
    """Both ways in the same processes, whose start takes longer than either."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port,), nprocs=RANKS)
