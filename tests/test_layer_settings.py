"""A layer made of ctx.AttentionSettings is the layer made of the same options by name."""

import dataclasses
import inspect

import pytest
import torch

import ctx
from ctx import layer_options
from strategies import assert_close, assert_same_bits

SCHEDULE = ctx.Schedule(window=4, compressed=3, ratio=2, segment=3, sinks=1)
SIZES = {"window": 4, "compressed": 3, "ratio": 2, "segment": 3, "sinks": 1}
CHANGES = [
    {},
    {"position": "alibi", "compressed_bias": "log_ratio"},
    {"position": "relative", "distance": "token"},
    {"position": None, "compressed_bias": "learned"},
    {"rotary_dim": 2, "rotary_base": 500.0, "rotary_interleaved": True, "distance": "token"},
]
#: Settings that no option gives.
ONLY = [
    {"inv_freq": (1.0, 0.5)},
    {
        "attention_factor": 1.5,
        "slot_mass": True,
        "logit_softcap": 30.0,
        "compressed_bias": "learned",
    },
]


def both(**changed):
    """A layer of settings, and one of options, with equal parameters."""
    settings = ctx.AttentionSettings(schedule=SCHEDULE, **changed)
    made = []
    for first, options in (
        ((settings,), {}),
        ((), {**SIZES, "compressed_bias": "none", **changed}),
    ):
        torch.manual_seed(0)
        made.append(ctx.CompressiveAttention(*first, embed_dim=16, num_heads=4, **options))
    return made


@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_the_same_layer(changed):
    """Numbers, memories and what it says of itself, in both paths; resolved settings, too."""
    ours, theirs = both(**changed)
    assert ours.spec == theirs.spec and ours.settings == theirs.settings
    again = ctx.CompressiveAttention(ours.settings.resolved(4), embed_dim=16, num_heads=4)
    assert again.settings == ours.settings and again.spec == ours.spec
    x = torch.randn(2, 23, 16)
    memory = ours.init_memory(2)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_same_bits(ours(x, memory.clone())[0], theirs(x, memory.clone())[0])


@pytest.mark.parametrize("changed", ONLY, ids=str)
def test_what_only_settings_have(changed):
    settings = ctx.AttentionSettings(schedule=SCHEDULE, **changed)
    ours = ctx.CompressiveAttention(settings, embed_dim=16, num_heads=4)
    again = ctx.CompressiveAttention(ours.settings.resolved(4), embed_dim=16, num_heads=4)
    assert again.settings == ours.settings and again.spec == ours.spec
    for name, value in changed.items():
        assert getattr(ours.settings, name) == value


def test_scale():
    """Only settings have one: scores of half the size are those of queries of half the size."""
    settings = ctx.AttentionSettings(schedule=SCHEDULE)
    torch.manual_seed(0)
    plain = ctx.CompressiveAttention(settings, embed_dim=16, num_heads=4)
    half = dataclasses.replace(settings, scale=0.25)
    torch.manual_seed(0)
    scaled = ctx.CompressiveAttention(half, embed_dim=16, num_heads=4)
    with torch.no_grad():
        plain.q_proj.weight.mul_(0.5)
    x = torch.randn(2, 23, 16)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_close(scaled(x)[0], plain(x)[0], 1e-6)


@pytest.mark.parametrize("name, value", [
    ("window", 4), ("compressed", 3), ("ratio", 2), ("segment", 3), ("sinks", 1),
    ("position", None), ("distance", "token"), ("compressed_bias", "none"),
    ("rotary_base", 9.0), ("rotary_dim", 2), ("rotary_interleaved", True),
])  # fmt: skip
def test_an_option_is_given_once(name, value):
    settings = ctx.AttentionSettings(schedule=SCHEDULE)
    with pytest.raises(ValueError, match=f"Attention: {name} must be given by settings alone, got"):
        ctx.CompressiveAttention(settings, embed_dim=16, num_heads=4, **{name: value})


def test_a_layer_makes_its_own_keys():
    settings = ctx.AttentionSettings(schedule=SCHEDULE, keys="rotated")
    with pytest.raises(ValueError, match=r"Attention: settings\.keys must be 'plain' .* got"):
        ctx.CompressiveAttention(settings, embed_dim=16, num_heads=4)


@pytest.mark.parametrize("first", [None, -4.0])
def test_a_learned_bias_starts_at_zero_with_mass(first):
    settings = ctx.AttentionSettings(schedule=SCHEDULE, compressed_bias="learned", slot_mass=True)
    layer = ctx.CompressiveAttention(
        settings, embed_dim=16, num_heads=4, compressed_bias_init=first
    )
    assert (layer.compressed_bias == (first or 0.0)).all()


def test_sizes_are_needed():
    settings = ctx.AttentionSettings(schedule=SCHEDULE)
    for options, name in (({"num_heads": 4}, "embed_dim"), ({"embed_dim": 16}, "num_heads")):
        with pytest.raises(TypeError, match=f"Attention: {name} must be an int, got None"):
            ctx.CompressiveAttention(settings, **options)
    with pytest.raises(TypeError, match="window must be an int"):
        ctx.CompressiveAttention(16, 4)
    with pytest.raises(TypeError, match="embed_dim must be given once, got 16, too"):
        ctx.CompressiveAttention(16, 4, embed_dim=16, **SIZES)


def test_defaults_are_the_signature_s():
    parameters = inspect.signature(ctx.CompressiveAttention).parameters
    assert {name: parameters[name].default for name in layer_options._FLAT} == layer_options._FLAT
    fields = {field.name: field.default for field in dataclasses.fields(ctx.AttentionSettings)}
    assert {
        name: fields[name] for name in layer_options.SETTINGS_ONLY
    } == layer_options.SETTINGS_ONLY
