"""The language model: its memory, its settings, and what it draws."""

import copy
import inspect
import math

import pytest
import torch
from torch.utils import _pytree as pytree

import ctx
from ctx.generation import Sampling

SIZES = {"window": 8, "compressed": 6, "ratio": 4, "segment": 8}


def config(**changed):
    settings = {"vocab_size": 50, "embed_dim": 32, "num_layers": 2, "num_heads": 4, **SIZES}
    return ctx.CompressiveTransformerConfig(**{**settings, **changed})


def model(**changed):
    """A model whose weights are large enough for its memory to matter."""
    built = ctx.CompressiveTransformer(config(**changed)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def tokens(rows, length):
    return torch.randint(0, 50, (rows, length))


CHOICES = [
    {},
    {"tied": False},
    {"mlp": "gelu"},
    {"mlp": "gelu", "mlp_dim": 24, "bias": True, "norm": "layer"},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "sinks": 3},
    {"compressor": "mean", "distance": "token"},
    {"compressor": "gated", "compressed_bias": "none"},
    {"compressor": "max", "compressed_bias": "log_ratio", "position": None},
    {"compressed": 0},
    {"window": 0, "segment": 5},
    {"segment": None, "rotary_dim": 4, "rotary_interleaved": True},
    {"position": "relative", "num_kv_heads": 2, "sinks": 1},
    {"position": "relative", "relative_dim": 10, "distance": "token", "compressor": "gated"},
    {"position": "alibi", "num_heads": 2, "sinks": 2},
]


@pytest.mark.parametrize("changed", CHOICES, ids=str)
def test_streaming_equals_one_differentiable_call(changed):
    built, text = model(**changed), tokens(3, 75)
    parallel, _ = built(text)
    assert parallel.requires_grad
    memory, parts = built.init_memory(3), []
    with torch.inference_mode():
        for chunk in text.split([1, 7, 8, 9, 1, 1, 40, 8], 1):
            logits, memory = built(chunk, memory)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), parallel, atol=2e-5, rtol=2e-5)


def test_the_far_past_matters_and_the_lost_past_does_not():
    built, text = model(), tokens(1, 60)
    other = text.clone()
    reach = built.schedule.reach + built.schedule.segment + built.schedule.ratio
    other[:, 40] = (other[:, 40] + 1) % 50
    with torch.inference_mode():
        near, far = (built(x)[0][:, -1] for x in (text, other))
        assert not torch.allclose(near, far)
        # One layer's reach bounds what a stack of two can see to twice as much.
        long = tokens(1, 2 * reach + 10)
        other = long.clone()
        other[:, 0] = (other[:, 0] + 1) % 50
        torch.testing.assert_close(built(long)[0][:, -1], built(other)[0][:, -1])


def test_under_grad_the_memory_passed_is_untouched():
    built, text = model(), tokens(2, 20)
    _, memory = built(text)
    before = copy.deepcopy(memory)
    _, after = built(text, memory)
    for old, same, new in zip(before, memory, after, strict=True):
        for name in old.tensors:
            assert torch.equal(old[name], same[name])
            assert not new[name].requires_grad
        assert new["seen"].tolist() == [40, 40]


def test_without_grad_the_memory_is_streamed_into_in_place():
    built, text = model(), tokens(2, 20)
    memory = built.init_memory(2)
    addresses = [tensor.data_ptr() for tensor in pytree.tree_leaves(memory)]
    with torch.no_grad():
        _, after = built(text, memory)
    assert [tensor.data_ptr() for tensor in pytree.tree_leaves(after)] == addresses
    assert all(layer["seen"].tolist() == [20, 20] for layer in memory)


def test_gradients_reach_every_parameter():
    built = model(tied=False).train()
    logits, _ = built(tokens(2, 60))
    logits.logsumexp(-1).mean().backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_lengths_may_be_a_counter_of_the_memory():
    built, text = model(), tokens(2, 9)
    with torch.no_grad():
        memory = built.init_memory(2)
        built(text[:, :4], memory)
        built(text, memory, lengths=memory[0]["seen"])
    assert [layer["seen"].tolist() for layer in memory] == [[8, 8], [8, 8]]


def test_memory_is_plain_tensors(tmp_path):
    built, text = model(), tokens(2, 33)
    with torch.no_grad():
        _, memory = built(text)
        assert isinstance(memory, ctx.Memory) and memory.spec == built.spec
        assert all(layer.spec == own.spec for layer, own in zip(memory, built.layers, strict=True))
        torch.save(memory, tmp_path / "memory.pt")
        loaded = torch.load(tmp_path / "memory.pt", weights_only=True)
        copied = copy.deepcopy(memory)
        leaves, spec = pytree.tree_flatten(memory)
        rebuilt = pytree.tree_unflatten([leaf.clone() for leaf in leaves], spec)
        expected = built(text, memory)[0]
        for other in (loaded, copied, rebuilt):
            assert torch.equal(built(text, other)[0], expected)


def test_memory_has_a_constant_size():
    built = model()
    memory = built.init_memory(1)
    size = sum(tensor.nbytes for tensor in pytree.tree_leaves(memory))
    with torch.inference_mode():
        for _ in range(5):
            _, memory = built(tokens(1, 50), memory)
    assert sum(tensor.nbytes for tensor in pytree.tree_leaves(memory)) == size


def test_rows_are_independent():
    built, text = model(), tokens(3, 40)
    with torch.no_grad():
        together, _ = built(text)
        alone, _ = built(text[1:2])
    torch.testing.assert_close(together[1:2], alone)


def test_tied_embeddings_are_one_parameter():
    tied, untied = model(tied=True), model(tied=False)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(untied) - count(tied) == 50 * 32
    assert tied.head is None


def test_swiglu_and_gelu_have_about_equal_parameters():
    sizes = [
        sum(p.numel() for p in model(mlp=mlp, embed_dim=128).parameters())
        for mlp in ("swiglu", "gelu")
    ]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02


def test_compressor_starts_as_it_is_built_and_weights_are_small():
    built = ctx.CompressiveTransformer(config())
    weight = built.blocks[0].attention.compressor.key_weight
    torch.testing.assert_close(weight[0], torch.eye(8).expand(4, 8, 8) / 4)
    assert 0.01 < built.blocks[0].attention.q_proj.weight.std() < 0.03
    logits, _ = built(tokens(2, 10))
    assert abs(torch.nn.functional.cross_entropy(logits[0], tokens(1, 10)[0]) - math.log(50)) < 0.2


class TestWithMemory:
    def test_shares_parameters(self):
        built = model()
        off = built.with_memory(compressed=0)
        assert off.config.compressed == 0 and built.config.compressed == 6
        assert all(a is b for a, b in zip(built.parameters(), off.parameters(), strict=True))
        with torch.no_grad():
            built.embedding.weight.mul_(2)
        text = tokens(1, 6)  # before anything is compressed both see the same
        torch.testing.assert_close(built(text)[0], off(text)[0])

    def test_equals_a_model_of_those_sizes(self):
        built, text = model(), tokens(2, 70)
        other = ctx.CompressiveTransformer(
            config(window=4, compressed=3, segment=4, sinks=2)
        ).eval()
        other.load_state_dict(built.state_dict())
        twin = built.with_memory(window=4, compressed=3, segment=4, sinks=2)
        with torch.no_grad():
            assert torch.equal(twin(text)[0], other(text)[0])
            assert not torch.allclose(twin(text)[0], built(text)[0])

    def test_leaves_mode_and_original_alone(self):
        built = model()
        off = built.with_memory(compressed=0).train()
        assert off.blocks[0].training and not built.training and not built.blocks[0].training
        assert built.blocks[0].attention.schedule.compressed == 6

    def test_wrong_sizes(self):
        with pytest.raises(ValueError, match="window"):
            model().with_memory(window=-1)


class TestGenerate:
    def test_greedy_is_the_argmax_of_parallel_logits(self):
        built, prompt = model(), tokens(2, 30)
        out = built.generate(prompt, 40, temperature=0)
        logits, _ = built(torch.cat([prompt, out], 1))
        assert torch.equal(out, logits[:, 29:-1].argmax(-1))

    def test_stream_is_generate(self):
        built, prompt = model(), tokens(2, 70)
        steps = list(built.stream(prompt, 9, seed=3))
        assert all(step.shape == (2,) for step in steps)
        assert torch.equal(torch.stack(steps, 1), built.generate(prompt, 9, seed=3))

    def test_seed(self):
        built, prompt = model(), tokens(2, 10)
        draws = [built.generate(prompt, 20, seed=seed) for seed in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])

    def test_a_seed_leaves_the_global_generator_alone(self):
        built, prompt = model(), tokens(1, 10)
        state = torch.get_rng_state()
        built.generate(prompt, 5, seed=1)
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(5)
        first = built.generate(prompt, 20)
        torch.manual_seed(5)
        assert torch.equal(first, built.generate(prompt, 20))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_goes_on_where_it_stopped(self, mode):
        built, prompt = model(), tokens(2, 10)
        whole = built.generate(prompt, 30, temperature=0)
        with mode():
            memory = built.init_memory(2)
            first = built.generate(prompt, 11, temperature=0, memory=memory)
            assert memory[0]["seen"].tolist() == [20, 20]
            rest = built.generate(first[:, -1:], 19, temperature=0, memory=memory)
        assert torch.equal(torch.cat([first, rest], 1), whole)

    def test_drawn_tokens_are_ordinary_tensors(self):
        built = model()
        out = built.generate(tokens(1, 4), 6, seed=0)
        built(out)[0].sum().backward()

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_prompts_of_unequal_length(self, side):
        """Every row continues as if it were alone, however long the prompts and wherever padded."""
        built, counts = model(), [1, 150, 64, 65]
        prompts = [tokens(1, count) for count in counts]
        text, mask = torch.zeros(4, 150, dtype=torch.int64), torch.zeros(4, 150, dtype=torch.bool)
        for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            place = slice(0, count) if side == "right" else slice(150 - count, 150)
            text[row, place], mask[row, place] = prompt[0], True
        rows = {"lengths": torch.tensor(counts)} if side == "right" else {"mask": mask}
        memory = built.init_memory(4)
        out = built.generate(text, 9, temperature=0, memory=memory, **rows)
        for row, prompt in enumerate(prompts):
            assert torch.equal(out[row], built.generate(prompt, 9, temperature=0)[0])
        assert memory[1]["seen"].tolist() == [count + 8 for count in counts]

    def test_an_empty_prompt_is_refused(self):
        built = model()
        with pytest.raises(
            ValueError, match="lengths must leave at least one token, got none in row 1"
        ):
            built.generate(tokens(2, 4), 1, lengths=torch.tensor([2, 0]))
        with pytest.raises(ValueError, match="mask must leave at least one token"):
            built.generate(tokens(1, 2), 1, mask=torch.zeros(1, 2, dtype=torch.bool))

    @pytest.mark.parametrize("method", ["generate", "stream"])
    def test_a_prompt_is_read_where_nothing_is_drawn(self, method):
        built, text = model(), tokens(2, 70)
        memory, wanted = built.init_memory(2), built.init_memory(2)
        drawn = getattr(built, method)(text, 0, memory=memory)
        assert drawn.shape == (2, 0) if method == "generate" else list(drawn) == []
        with torch.no_grad():
            built(text[:, :64], wanted)
            built(text[:, 64:], wanted)
        for mine, layer in zip(memory, wanted, strict=True):
            assert mine["seen"].tolist() == [70, 70]
            assert all(torch.equal(mine[name], layer[name]) for name in layer.tensors)

    @pytest.mark.parametrize(
        "changed, error, message",
        [
            (
                {"temperature": -0.1},
                ValueError,
                "temperature must be finite and at least 0, got -0.1",
            ),
            ({"temperature": math.nan}, ValueError, "temperature must be finite"),
            ({"temperature": "1"}, TypeError, "temperature must be a number"),
            ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
            ({"top_k": 2.0}, TypeError, "top_k must be an int"),
            ({"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1, got 0.0"),
            ({"top_p": 1.5}, ValueError, "top_p must be above 0 and at most 1, got 1.5"),
            ({"seed": -1}, ValueError, "seed must be at least 0"),
            ({"num_tokens": -1}, ValueError, "num_tokens must be at least 0, got -1"),
            ({"num_tokens": 1.5}, TypeError, "num_tokens must be an int"),
            (
                {"tokens": torch.zeros(0, 4, dtype=torch.int64)},
                ValueError,
                "at least one row, got B",
            ),
            ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, "T >= 1"),
            ({"tokens": torch.zeros(1, 2)}, TypeError, "tokens must be int64"),
            ({"tokens": torch.tensor([[50]])}, IndexError, r"\[0, 50\), got 50"),
        ],
    )
    @pytest.mark.parametrize("method", ["generate", "stream"])
    def test_errors_come_at_once_and_touch_nothing(self, method, changed, error, message):
        built = model()
        memory = built.init_memory(1)
        before = copy.deepcopy(memory)
        settings = {"tokens": tokens(1, 4), "num_tokens": 2, "memory": memory, **changed}
        with pytest.raises(error, match=message) as caught:
            getattr(built, method)(settings.pop("tokens"), settings.pop("num_tokens"), **settings)
        assert str(caught.value).startswith(f"ctx.CompressiveTransformer.{method}: ")
        for a, b in zip(pytree.tree_leaves(before), pytree.tree_leaves(memory), strict=True):
            assert torch.equal(a, b)


class TestSampling:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])

    def probabilities(self, **settings):
        return Sampling(**settings).probabilities(self.logits)[0]

    def test_plain(self):
        torch.testing.assert_close(self.probabilities(), self.logits.softmax(-1)[0])

    def test_temperature(self):
        expected = (self.logits / 0.5).softmax(-1)[0]
        torch.testing.assert_close(self.probabilities(temperature=0.5), expected)
        tiny = self.probabilities(temperature=1e-40)
        assert tiny.tolist() == [1, 0, 0, 0, 0]

    @pytest.mark.parametrize("k", [1, 2, 4, 5, 1000])
    def test_top_k_keeps_k(self, k):
        kept = self.probabilities(top_k=k)
        assert int((kept > 0).sum()) == min(k, 4)
        torch.testing.assert_close(kept.sum(), torch.tensor(1.0))

    def test_top_k_keeps_k_of_equals(self):
        kept = Sampling(top_k=3).probabilities(torch.zeros(2, 10))
        assert (kept > 0).sum(-1).tolist() == [3, 3]

    @pytest.mark.parametrize("p, count", [(1e-9, 1), (0.6, 1), (0.7, 2), (0.95, 3), (1.0, 4)])
    def test_top_p_keeps_the_fewest_that_reach_p(self, p, count):
        assert int((self.probabilities(top_p=p) > 0).sum()) == count

    def test_top_k_comes_before_top_p(self):
        # Of the two kept by k the first has 0.73: enough for p = 0.7.
        assert int((self.probabilities(top_k=2, top_p=0.7) > 0).sum()) == 1

    def test_draws_follow_the_probabilities(self):
        draw = Sampling(seed=0).sampler(torch.device("cpu"))
        drawn = draw(self.logits.expand(20_000, 5))
        shares = torch.bincount(drawn, minlength=5) / 20_000
        torch.testing.assert_close(shares, self.logits.softmax(-1)[0], atol=0.02, rtol=0)


class TestForwardErrors:
    @pytest.mark.parametrize(
        "bad, error, message",
        [
            ([[1]], TypeError, "tokens must be a tensor, got list"),
            (torch.zeros(2, 3), TypeError, "tokens must be int64, got torch.float32"),
            (torch.zeros(3, dtype=torch.int64), ValueError, r"tokens must be \[B, T\], got \[3\]"),
            (
                torch.zeros(0, 3, dtype=torch.int64),
                ValueError,
                r"tokens must have at least one row, got B = 0 in \[0, 3\]",
            ),
            (torch.tensor([[-1]]), IndexError, "got -1"),
            (torch.tensor([[3, 50]]), IndexError, "got 50"),
        ],
    )
    def test_tokens(self, bad, error, message):
        with pytest.raises(error, match=message):
            model()(bad)

    def test_memory(self):
        built, text = model(), tokens(2, 3)
        with pytest.raises(ValueError, match="memory must have 2 layers, got 1"):
            built(text, built.init_memory(2)[0])
        for bad in ([built.init_memory(2)], built.init_memory(2)[0].tensors, 3):
            with pytest.raises(TypeError, match=r"memory must be a ctx\.Memory or None"):
                built(text, bad)

    @pytest.mark.parametrize("grad", [True, False])
    def test_a_wrong_layer_is_found_before_another_is_written(self, grad):
        built, text = model(), tokens(2, 3)
        memory = built.init_memory(2)
        memory.rings[1] = built.with_memory(window=16).init_memory(2).rings[1]
        before = copy.deepcopy(memory)
        with torch.set_grad_enabled(grad), pytest.raises((ValueError, TypeError)):
            built(text, memory)
        for a, b in zip(pytree.tree_leaves(before), pytree.tree_leaves(memory), strict=True):
            assert torch.equal(a, b)


class TestConfig:
    def test_round_trip(self):
        for changed in CHOICES:
            first = config(**changed)
            again = ctx.CompressiveTransformerConfig.from_dict(first.to_dict())
            assert again == first and hash(again) == hash(first)

    def test_defaults_are_those_of_the_layer(self):
        layer = inspect.signature(ctx.CompressiveAttention).parameters
        shared = {
            name: parameter.default
            for name, parameter in inspect.signature(
                ctx.CompressiveTransformerConfig
            ).parameters.items()
            if name in layer and parameter.default is not inspect.Parameter.empty
        }
        assert len(shared) >= 12
        assert shared == {name: layer[name].default for name in shared}

    def test_from_dict_names_what_is_wrong(self):
        settings = config().to_dict()
        del settings["ratio"]
        with pytest.raises(ValueError, match=r"unknown \['rate'\] and missing \['ratio'\]"):
            ctx.CompressiveTransformerConfig.from_dict({**settings, "rate": 4})

    @pytest.mark.parametrize(
        "changed, error, message",
        [
            ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
            ({"embed_dim": 32.0}, TypeError, "embed_dim must be an int, got 32.0"),
            ({"num_layers": True}, TypeError, "num_layers must be an int, got True"),
            ({"num_heads": 5}, ValueError, "embed_dim must be a multiple of num_heads = 5, got 32"),
            ({"num_kv_heads": 3}, ValueError, "num_kv_heads must divide num_heads = 4, got 3"),
            ({"embed_dim": 12}, ValueError, "rotary_dim must be even .* got 3"),
            ({"rotary_dim": 10}, ValueError, "rotary_dim must be even and at most .* = 8, got 10"),
            ({"rotary_base": math.inf}, ValueError, "rotary_base must be positive"),
            (
                {"position": "sinusoid"},
                ValueError,
                "position must be one of 'rotary', 'relative', 'alibi', None, got 'sinusoid'",
            ),
            ({"relative_dim": 0}, ValueError, "relative_dim must be even and positive, got 0"),
            (
                {"position": "relative", "relative_dim": 5},
                ValueError,
                "relative_dim must be even and positive, got 5",
            ),
            ({"window": -1}, ValueError, "window"),
            ({"ratio": 0}, ValueError, "ratio"),
            ({"segment": 0}, ValueError, "segment"),
            ({"compressor": "zip"}, ValueError, "compressor must be one of 'mean'.* got 'zip'"),
            ({"mlp": "relu"}, ValueError, "mlp must be one of 'swiglu', 'gelu', got 'relu'"),
            ({"norm": None}, ValueError, "norm must be one of"),
            ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
            ({"dropout": math.nan}, ValueError, "dropout"),
            ({"tied": 1}, TypeError, "tied must be a bool, got 1"),
        ],
    )
    def test_errors(self, changed, error, message):
        with pytest.raises(error, match=message) as caught:
            config(**changed)
        assert str(caught.value).startswith("ctx.")


def test_dropout_acts_in_training_only():
    built, text = model(dropout=0.5), tokens(1, 20)
    assert torch.equal(built(text)[0], built(text)[0])
    built.train()
    assert not torch.equal(built(text)[0], built(text)[0])
