"""`compressed_bias_init`: where the learned bias of compressed slots starts, by layer, model and
command line; and what was written before it was a setting still loads."""

import math

import numpy
import pytest
import torch

import ctx
from ctx.recipes import checkpoint
from ctx.recipes.ablation_settings import AblationSettings
from ctx.recipes.data import Corpus
from ctx.recipes.errors import RecipeError
from ctx.recipes.loading import load_model
from ctx.recipes.presets import PRESETS
from ctx.recipes.recall_settings import RecallSettings
from ctx.recipes.settings import TrainSettings, model_config
from ctx.recipes.trainer import Trainer

SIZES = {"window": 4, "compressed": 3, "ratio": 4}


def model(**changed):
    settings = {"vocab_size": 11, "embed_dim": 16, "num_layers": 2, "num_heads": 2, **SIZES}
    return ctx.CompressiveTransformer(ctx.CompressiveTransformerConfig(**{**settings, **changed}))


@pytest.mark.parametrize("given, start", [(None, math.log(4)), (-4, -4.0), (0.0, 0.0)])
def test_where_it_starts(given, start):
    attn = ctx.CompressiveAttention(8, 2, **SIZES, compressed_bias_init=given)
    built = model(compressed_bias_init=given)
    for layer in (attn, *built.layers):
        assert layer.compressed_bias.tolist() == pytest.approx([start] * 2)
        with torch.no_grad():
            layer.compressed_bias.fill_(7.0)
    built.reset_parameters()
    assert built.layers[1].compressed_bias.tolist() == pytest.approx([start] * 2)


def test_a_closed_start_hides_slots_and_learns():
    torch.manual_seed(0)
    text = torch.randint(0, 11, (1, 40))
    shares = {}
    for start in (None, -4.0, -30.0):
        torch.manual_seed(0)
        built = model(compressed_bias_init=start)
        shares[start] = built(text, return_region_weights=True)[2][..., 1].mean().item()
        if start == -30.0:
            assert torch.allclose(built(text)[0], built.with_memory(compressed=0)(text)[0])
        if start == -4.0:
            built(text)[0].square().sum().backward()
            assert all(layer.compressed_bias.grad.abs().sum() > 0 for layer in built.layers)
    assert shares[None] > 10 * shares[-4.0] > 0


@pytest.mark.parametrize("made", ["layer", "config"])
@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"compressed_bias_init": "low"}, TypeError, "must be a number, got 'low'"),
        ({"compressed_bias_init": True}, TypeError, "must be a number, got True"),
        ({"compressed_bias_init": math.inf}, ValueError, "must be finite, got inf"),
        *(
            (
                {"compressed_bias": kind, "compressed_bias_init": -4},
                ValueError,
                f"must be None for compressed_bias '{kind}', got -4.0",
            )
            for kind in ("none", "log_ratio")
        ),
    ],
)
def test_wrong_starts(made, changed, error, message):
    def layer(**options):
        return ctx.CompressiveAttention(8, 2, **SIZES, **options)

    with pytest.raises(error, match=f"ctx.Compressive.*: compressed_bias_init {message}"):
        {"layer": layer, "config": model}[made](**changed)


def test_configurations_carry_it():
    config = model(compressed_bias_init=numpy.float32(-4)).config
    assert config.to_dict()["compressed_bias_init"] == -4.0
    assert ctx.CompressiveTransformerConfig.from_dict(config.to_dict()) == config
    old = config.to_dict()
    del old["compressed_bias_init"]  # as it was written before
    assert ctx.CompressiveTransformerConfig.from_dict(old).compressed_bias_init is None


def test_the_commands_start_closed():
    assert model_config({}).compressed_bias_init == -4.0
    assert model_config({"compressed_bias_init": 1.0}).compressed_bias_init == 1.0
    for kind in ("none", "log_ratio"):
        assert model_config({"compressed_bias": kind}).compressed_bias_init is None
    with pytest.raises(RecipeError, match="`compressed_bias_init` must be None"):
        model_config({"compressed_bias": "none", "compressed_bias_init": -4.0})
    for preset in PRESETS.values():
        assert model_config(preset.model).compressed_bias_init is None
    assert {v.config.compressed_bias_init for v in AblationSettings().variants()} == {-4.0}
    changed = AblationSettings(compressed_bias_init=1.5).variants()
    assert {v.config.compressed_bias_init for v in changed} == {1.5}
    with pytest.raises(RecipeError, match="`compressed_bias_init` must be finite, got nan"):
        AblationSettings(compressed_bias_init=math.nan)
    assert {c.config.compressed_bias_init for c in RecallSettings().contestants()} == {None}


def test_a_run_from_before_continues(tmp_path):
    """Its configuration has no start, and its memory none of the entries that came later."""
    small = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "window": 8, "compressed": 4,
             "segment": 8, "compressed_bias_init": None}  # fmt: skip
    text = (torch.arange(700) ** 2 % 251).to(torch.uint8)
    settings = TrainSettings(steps=9, batch=3, length=20, warmup=2, threads=1)

    def trainer():
        return Trainer(model_config(small), settings, Corpus(text, text[:50], "d"))

    old = trainer()
    for _ in range(3):
        old.train_step()
    state = {"files": [], "digest": "d", **old.state()}
    del state["config"]["compressed_bias_init"]
    state["memory"] = [layer.tensors for layer in ctx.Memory.from_state_dict(state["memory"])]
    checkpoint.save(tmp_path / checkpoint.FILE_NAME, state)
    loaded = checkpoint.load(tmp_path / checkpoint.FILE_NAME)
    assert loaded["compare"] is False
    assert load_model(tmp_path).config.compressed_bias_init is None
    new = trainer()
    new.load(loaded)
    for _ in range(4):
        assert new.train_step()["bits_per_byte"] == old.train_step()["bits_per_byte"]
