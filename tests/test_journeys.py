"""A model trains a step, generates, and trains again: replicated (DDP), sharded (FSDP2), compiled,
exported, packaged (AOTInductor), with adapters (LoRA) and with quantised projections. Each does
what the plain model does."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import ctx
from compiled import Compiled

NEW = 5
SIZES = {"window": 6, "compressed": 4, "ratio": 2, "segment": 4, "sinks": 1}


def make(**changed: Any) -> ctx.CompressiveTransformer:
    torch.manual_seed(0)
    settings = {"vocab_size": 30, "embed_dim": 16, "num_layers": 2, "num_heads": 2, **SIZES}
    return ctx.CompressiveTransformer(ctx.CompressiveTransformerConfig(**{**settings, **changed}))


def text() -> Tensor:
    return torch.randint(30, (2, 25), generator=torch.Generator().manual_seed(1))


def descent(model: nn.Module) -> torch.optim.Optimizer:
    """Made once: what it holds must be what trains, also where shards are gathered in between."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)


def train_step(
    call: Callable[..., Any], optimizer: torch.optim.Optimizer, memory: Any
) -> tuple[float, Any]:
    """One step of gradient descent over a carried memory."""
    tokens = text()
    logits, memory = call(tokens[:, :-1], memory)
    loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), memory


def greedy(step: Callable[..., Any], memory: Any) -> Tensor:
    """The likeliest tokens behind the text, one call of `step` for each."""
    out, tokens = [], text()
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            logits, memory = step(tokens[:, t : t + 1].contiguous(), memory)
        for _ in range(NEW):
            out.append(logits[:, -1].argmax(-1))
            logits, memory = step(out[-1][:, None], memory)
    return torch.stack(out, 1)


def journey(call: Callable[..., Any], model: Any, generate: Callable[..., Tensor]) -> list[Any]:
    """Losses before and after generating, and what was generated."""
    optimizer = descent(model)
    first, memory = train_step(call, optimizer, model.init_memory(2))
    drawn = generate(text(), NEW, temperature=0)
    second, _ = train_step(call, optimizer, memory)
    third, _ = train_step(call, optimizer, model.init_memory(2))
    assert third < first
    return [first, drawn, second, third]


def assert_same_journey(got: list[Any], want: list[Any]) -> None:
    for one, other in zip(got, want, strict=True):
        if isinstance(other, Tensor):
            assert torch.equal(one, other)
        else:
            assert one == pytest.approx(other, rel=1e-5)


def plain(**changed: Any) -> list[Any]:
    model = make(**changed)
    return journey(model, model, model.generate)


@pytest.fixture
def group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_replicated(group):
    model = make()
    replica = DistributedDataParallel(model)
    assert_same_journey(journey(replica, model, model.generate), plain())


@pytest.mark.parametrize("tied", [True, False])
def test_sharded(group, tied):
    model = make(tied=tied)
    for block in model.blocks:
        fully_shard(block, mesh=group)
    if not tied:
        fully_shard(model.head, mesh=group)
    fully_shard(model, mesh=group)
    assert_same_journey(journey(model, model, model.generate), plain(tied=tied))


def test_compiled():
    """Trained and generated from by one module, in one graph for each of the two modes."""
    model = make(num_layers=1)
    compiled = Compiled(model, "aot_eager")

    def generate(tokens, number, *, temperature):
        assert (number, temperature) == (NEW, 0)
        return greedy(compiled.run, model.init_memory(2))

    assert_same_journey(journey(compiled.run, model, generate), plain(num_layers=1))
    assert compiled.graphs == 2


class Step(nn.Module):
    """What is exported: one token of every row."""

    def __init__(self, model: ctx.CompressiveTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, memory: Any) -> Any:
        return self.model(tokens, memory)


def export(model: ctx.CompressiveTransformer) -> Any:
    step = Step(copy.deepcopy(model).eval())
    with torch.no_grad():
        return torch.export.export(step, (text()[:, :1].contiguous(), model.init_memory(2)))


def test_exported():
    """What training made is exported, draws the same, and training goes on."""
    model = make()

    def generate(tokens, number, *, temperature):
        return greedy(export(model).module(), model.init_memory(2))

    assert_same_journey(journey(model, model, generate), plain())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [{}, {"compressor": "most_used", "position": "alibi"}, {"memory_content": "hidden"}],
)
def test_packaged(changed, monkeypatch, tmp_path):
    """AOTInductor's package of an exported step, loaded and run: lists of tensors that are empty
    reach the operators as None."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    changed = {"num_layers": 1, **changed}
    model = make(**changed)

    def generate(tokens, number, *, temperature):
        path = torch._inductor.aoti_compile_and_package(
            export(model), package_path=str(tmp_path / "step.pt2")
        )
        return greedy(torch._inductor.aoti_load_package(path), model.init_memory(2))

    assert_same_journey(journey(model, model, generate), plain(**changed))


class LoRA(nn.Module):
    """base(x) + x A B, the base frozen (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(base.in_features, rank) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(rank, base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + x @ self.a @ self.b


def replace_linears(model: nn.Module, wrap: Callable[[nn.Linear], nn.Module]) -> int:
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    for parent, name, child in found:
        setattr(parent, name, wrap(child))
    return len(found)


def test_adapters():
    """A model of frozen weights and trained adapters is one of the sums of both."""
    model = make(tied=False)
    model.requires_grad_(False)
    assert replace_linears(model, LoRA) == 2 * 6 + 1
    merged = make(tied=False)
    losses = journey(model, model, model.generate)

    def add(name: str) -> Tensor:
        adapter = model.get_submodule(name.removesuffix(".weight"))
        with torch.no_grad():
            return (adapter.a @ adapter.b).T

    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            if name.endswith(("proj.weight", "up.weight", "down.weight")):
                parameter.add_(add(name))
        merged.head.weight.add_(add("head.weight"))
    assert torch.equal(
        model.generate(text(), NEW, temperature=0), merged.generate(text(), NEW, temperature=0)
    )
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


class Quantised(nn.Module):
    """A projection of int8 weights and a scale for each row, as packages of quantisation have."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        weight = base.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("kind", ["int8", "dynamic"])
def test_quantised_projections(kind):
    """What is left of the parameters trains, and generation is that of the quantised weights."""
    if kind == "int8":
        model, other = make(tied=False), make(tied=False)
        replace_linears(model, Quantised)
        replace_linears(other, lambda linear: Dequantised(Quantised(linear)))
        got, want = (journey(one, one, one.generate) for one in (model, other))
        assert_same_journey(got, want)
        return
    trained = make(tied=False)
    optimizer = descent(trained)
    train_step(trained, optimizer, None)
    model = torch.ao.quantization.quantize_dynamic(trained, {nn.Linear}, dtype=torch.qint8)
    drawn = model.generate(text(), NEW, temperature=0)
    assert torch.equal(drawn, greedy(model, model.init_memory(2)))
    train_step(trained, optimizer, None)  # the original goes on


class Dequantised(nn.Linear):
    """An ordinary linear layer of the numbers that a quantised one stands for, not trained."""

    def __init__(self, quantised: Quantised) -> None:
        rows, columns = quantised.weight.shape
        super().__init__(columns, rows, bias=False)
        self.weight = nn.Parameter(quantised.weight * quantised.scale, requires_grad=False)
