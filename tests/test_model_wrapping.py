"""Every submodule of a model is called: what wraps it counts, learns, and sees its hooks run."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ctx
from pairwise import pairwise

SIZES = {"window": 4, "compressed": 3, "ratio": 2, "segment": 4}
BLOCK = ("attention_norm", "attention", "mlp_norm", "mlp", "mlp.up", "mlp.down", "dropout")
PROJECTIONS = tuple(f"attention.{name}_proj" for name in ("q", "k", "v", "out"))
PLACES = [
    *("embedding", "dropout", "norm", "head"),
    *(f"blocks.1.{name}" for name in BLOCK),
    *(f"blocks.0.{name}" for name in PROJECTIONS),
    "blocks.0",
]
MODELS = [
    (place, {"norm": norm, "mlp": mlp, "tied": tied})
    for place, norm, mlp, tied in pairwise(
        PLACES, ("rms", "layer"), ("swiglu", "gelu"), (True, False)
    )
]


class Adds(nn.Module):
    """Owns a base, and adds a vector that it learns to its output (the first one of several)."""

    def __init__(self, base, width):
        super().__init__()
        self.base = base
        self.added = nn.Parameter(0.3 * torch.randn(width))

    def forward(self, *args, **options):
        out = self.base(*args, **options)
        return (out[0] + self.added, *out[1:]) if isinstance(out, tuple) else out + self.added


def model(**changed):
    settings = {"vocab_size": 11, "embed_dim": 16, "num_layers": 2, "num_heads": 2, **SIZES}
    torch.manual_seed(0)
    built = ctx.CompressiveTransformer(ctx.CompressiveTransformerConfig(**{**settings, **changed}))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def width_of(built, place):
    if place == "head":
        return built.config.vocab_size
    if place.endswith("mlp.up"):
        return built.get_submodule(place).out_features
    return built.config.embed_dim


def wrap(built, place):
    """Puts a wrapper there; returns it and how often it and its base have run."""
    wrapper = Adds(built.get_submodule(place), width_of(built, place))
    built.set_submodule(place, wrapper)
    runs = [0, 0]

    def count(index):
        def hook(module, args, out):
            runs[index] += 1

        return hook

    wrapper.register_forward_hook(count(0))
    wrapper.base.register_forward_hook(count(1))
    return wrapper, runs


def by_hand(built, place, added, tokens):
    """The logits of an unwrapped model, with a vector added behind one of its parts."""

    def at(name, x):
        return x + added if name == place else x

    def norm(name, x):
        module = built.get_submodule(name)
        if isinstance(module, nn.LayerNorm):
            return at(name, F.layer_norm(x, x.shape[-1:], module.weight, module.bias))
        return at(name, F.rms_norm(x, x.shape[-1:], module.weight, 1e-6))

    def mlp(name, x):
        up, down = (built.get_submodule(f"{name}.{part}").weight for part in ("up", "down"))
        hidden = at(f"{name}.up", x @ up.T)
        if built.config.mlp == "swiglu":
            gate, value = hidden.chunk(2, -1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden)
        return at(name, at(f"{name}.down", hidden @ down.T))

    def attention(name, x):
        part = place.removeprefix(f"{name}.")
        if part not in ("q_proj", "k_proj", "v_proj", "out_proj"):
            return at(name, built.get_submodule(name)(x)[0])
        plain = built.config.attention(0)
        other = ctx.CompressiveAttention(**{**plain, "bias": True})  # a bias is such an addition
        other.load_state_dict(built.get_submodule(name).state_dict(), strict=False)
        biases = {f"{one}_proj.bias": torch.zeros(16) for one in ("q", "k", "v", "out")}
        biases[f"{part}.bias"] = added
        return torch.func.functional_call(other, biases, (x,))[0]

    table = at("embedding", built.embedding.weight)
    x = at("dropout", table[tokens])
    for i in range(2):
        block = f"blocks.{i}"
        x = x + attention(f"{block}.attention", norm(f"{block}.attention_norm", x))
        branch = mlp(f"{block}.mlp", norm(f"{block}.mlp_norm", x))
        x = at(block, x + at(f"{block}.dropout", branch))
    x = norm("norm", x)
    return x @ table.T if built.head is None else at("head", x @ built.head.weight.T)


@pytest.mark.parametrize("place, changed", MODELS, ids=str)
def test_what_wraps_a_submodule_counts(place, changed):
    if place == "head" and changed["tied"]:
        changed = {**changed, "tied": False}
    built, plain = model(**changed), model(**changed)
    wrapper, runs = wrap(built, place)
    tokens = torch.randint(0, 11, (2, 23))

    logits, _ = built(tokens)
    wanted = by_hand(plain, place, wrapper.added, tokens)
    assert not torch.allclose(plain(tokens)[0], wanted, atol=1e-3)
    torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=2e-5)
    weights = torch.randn_like(logits)
    got, asked = (
        torch.autograd.grad((x * weights).sum(), wrapper.added)[0] for x in (logits, wanted)
    )
    assert asked.abs().max() > 1e-3 or place.endswith("k_proj")
    torch.testing.assert_close(got, asked, atol=1e-3, rtol=1e-3)
    assert min(runs) > 0

    before = list(runs)
    with torch.no_grad():
        parts, memory = [], built.init_memory(2)
        for chunk in tokens.split([1, 5, 1, 16], 1):
            parts.append(built(chunk, memory)[0])
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=2e-5, rtol=2e-5)
    assert all(now >= then + 4 for now, then in zip(runs, before, strict=True))
    drawn = built.generate(tokens, 3, temperature=0)
    assert torch.equal(drawn[:, 0], wanted[:, -1].argmax(-1))

    off = built.with_memory(compressed=0)
    assert [layer.schedule.compressed for layer in off.layers] == [0, 0]
    assert [layer.schedule.compressed for layer in built.layers] == [3, 3]
    assert all(a is b for a, b in zip(off.parameters(), built.parameters(), strict=True))


def test_the_bias_of_a_head_moves_logits():
    built = model(tied=True)
    tokens = torch.randint(0, 11, (2, 9))
    built.head = nn.Linear(16, 11)
    with torch.no_grad():
        built.head.bias.zero_()
        plain = built(tokens)[0]
        built.head.bias.fill_(5.0)
        torch.testing.assert_close(built(tokens)[0], plain + 5.0)


class Squares(nn.Module):
    """A head without a weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x[..., :11].square()


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_only_has_forward(tied):
    built = model(tied=tied)
    built.head = Squares()
    built.reset_parameters()
    logits, _ = built(torch.randint(0, 11, (2, 9)))
    assert (logits >= 0).all()
    logits.sum().backward()
    assert built.head.scale.grad is not None


class Table(nn.Module):
    """An embedding that keeps its vectors under another name, in another dtype, as a buffer."""

    def __init__(self, base):
        super().__init__()
        scale = base.weight.detach().abs().amax() / 127
        self.register_buffer("rows", (base.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, tokens):
        return self.rows[tokens] * self.scale


def test_a_quantised_embedding():
    built = model()
    tokens = torch.randint(0, 11, (2, 9))
    built.embedding = Table(built.embedding)
    vectors = built.embedding.rows * built.embedding.scale
    logits, _ = built(tokens)
    plain = model()
    with torch.no_grad():
        plain.embedding.weight.copy_(vectors)
    torch.testing.assert_close(logits, plain(tokens)[0])
    built.generate(tokens, 2)
    built.reset_parameters()


def test_a_parametrised_embedding_is_called():
    """`torch.nn.utils.parametrize` changes the class, and computes the weight when it is read."""
    built, plain = model(), model()

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(built.embedding, "weight", Doubled())
    with torch.no_grad():
        plain.embedding.weight.mul_(2)
    tokens = torch.randint(0, 11, (2, 9))
    torch.testing.assert_close(built(tokens)[0], plain(tokens)[0])


def test_a_block_without_attention_is_named():
    built = model()
    built.blocks[1] = nn.Identity()
    with pytest.raises(TypeError, match=r"blocks must each have .* got none in blocks\[1\]"):
        built.init_memory(1)


class LowRank(nn.Module):
    """An adapter as LoRA has it (Hu et al. 2021, arXiv:2106.09685): base(x) + B A x, B first 0."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def train_step(built, tokens):
    optimizer = torch.optim.SGD([p for p in built.parameters() if p.requires_grad], lr=0.5)
    logits, _ = built(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_adapters_everywhere_train_generate_and_train():
    built, plain = model(tied=False), model(tied=False)
    tokens = torch.randint(0, 11, (2, 23))
    built.requires_grad_(False)
    linear = [name for name, one in built.named_modules() if isinstance(one, nn.Linear)]
    for name in linear:
        built.set_submodule(name, LowRank(built.get_submodule(name)))
    torch.testing.assert_close(built(tokens)[0], plain(tokens)[0])
    for _ in range(2):
        train_step(built, tokens)
        with torch.no_grad():
            for name in linear:  # merged, as adapters are for serving
                adapter, merged = built.get_submodule(name), plain.get_submodule(name)
                merged.weight.copy_(adapter.base.weight + adapter.up @ adapter.down)
        torch.testing.assert_close(built(tokens)[0], plain(tokens)[0], atol=1e-5, rtol=1e-5)
        drawn = [one.generate(tokens, 4, temperature=0) for one in (built, plain)]
        assert torch.equal(*drawn)
    assert all(built.get_submodule(name).up.abs().sum() > 0 for name in linear)


@pytest.mark.filterwarnings("ignore")  # torch announces that it will move
def test_dynamically_quantised_linears():
    built = model(tied=False).eval()
    small = torch.ao.quantization.quantize_dynamic(built, {nn.Linear})
    assert not isinstance(small.head, nn.Linear)
    tokens = torch.randint(0, 11, (2, 23))
    with torch.no_grad():
        wanted, got = built(tokens)[0], small(tokens)[0]
    assert 0 < (got - wanted).abs().max() < 0.1 * wanted.abs().max()
    memory = small.init_memory(2)
    assert small.generate(tokens, 3, memory=memory).shape == (2, 3)
    assert memory[0]["seen"].tolist() == [25, 25]


def test_with_memory_of_a_compiled_model_is_not_what_was_compiled():
    built = model()
    tokens = torch.randint(0, 11, (2, 23))
    wanted = built.with_memory(compressed=0)(tokens)[0]
    built.compile(backend="eager")
    twin = built.with_memory(compressed=0)
    torch.testing.assert_close(twin(tokens)[0], wanted)
    with torch.no_grad():
        twin(tokens, twin.init_memory(2))
    torch._dynamo.reset()


def test_with_memory_copies_a_module_that_stands_twice_once():
    built = model(tied=False)
    built.again = built.head
    twin = built.with_memory(compressed=0)
    assert twin.again is twin.head is not built.head
