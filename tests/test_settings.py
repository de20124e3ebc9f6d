"""AttentionSettings: one validated value, and the frequencies of Hugging Face models."""

import dataclasses
import importlib.util
import json
import math
import pickle

import numpy as np
import pytest
import torch

import ctx
from ctx import reference

LAW = ctx.Schedule(8, 4, 2, 4, 1)
EVERYTHING = {
    "schedule": LAW,
    "position": "rotary",
    "distance": "token",
    "rotary_dim": 6,
    "rotary_base": 500.0,
    "rotary_interleaved": True,
    "inv_freq": (1.0, 0.5, 0.25),
    "attention_factor": 1.2,
    "keys": "rotated",
    "scale": 0.3,
    "compressed_bias": "learned",
    "slot_mass": True,
    "logit_softcap": 30.0,
}


def made(**settings):
    return ctx.AttentionSettings(**{"schedule": LAW, **settings})


def test_is_a_frozen_value():
    settings = made(**EVERYTHING)
    assert {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)} == EVERYTHING
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.scale = 1.0
    assert pickle.loads(pickle.dumps(settings)) == settings
    assert hash(dataclasses.replace(settings)) == hash(settings)
    with pytest.raises(TypeError):
        ctx.AttentionSettings(LAW)


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_setting_makes_a_difference(name):
    plain = {"keys": "plain", "slot_mass": False, "inv_freq": None}
    changed = {**EVERYTHING, **plain}
    changed |= {name: EVERYTHING[name]} if name in plain else {}
    if name not in plain:
        default = {"schedule": ctx.Schedule(8, 4, 2), "position": None}
        field = {f.name: f for f in dataclasses.fields(ctx.AttentionSettings)}[name]
        changed[name] = default.get(name, field.default)
    assert made(**changed) != made(**{**EVERYTHING, **plain})


@pytest.mark.parametrize("numbers", [np.array([1.0, 0.5]), torch.tensor([1.0, 0.5]), [1, 0.5]])
def test_sequences_become_tuples_of_floats(numbers):
    settings = made(inv_freq=numbers, rotary_base=20, scale=np.float32(0.5), rotary_dim=np.int64(4))
    assert settings == made(inv_freq=(1.0, 0.5), rotary_base=20.0, scale=0.5, rotary_dim=4)
    assert [type(x) for x in settings.inv_freq] == [float, float]
    assert hash(settings) == hash(dataclasses.replace(settings))


def test_no_cap_is_one_value():
    assert made(logit_softcap=0) == made(logit_softcap=None) == made()


VALUES = {
    "position": ("sinusoid", "'sinusoid'"),
    "distance": ("far", "'far'"),
    "keys": ("turned", "'turned'"),
    "compressed_bias": ("mean", "'mean'"),
    "rotary_dim": (3, "3"),
    "rotary_base": (0.0, "0"),
    "attention_factor": (-1.0, "-1"),
    "scale": (0.0, "0"),
    "logit_softcap": (-2.0, "-2"),
    "inv_freq": ((1.0, math.nan), "nan"),
}
TYPES = {
    "schedule": (reference.Schedule(8, 4, 2), "Schedule"),
    "rotary_dim": (2.0, "2.0"),
    "rotary_base": ("10", "'10'"),
    "rotary_interleaved": (1, "1"),
    "attention_factor": (None, "None"),
    "scale": (True, "True"),
    "slot_mass": ("yes", "'yes'"),
    "logit_softcap": ("0", "'0'"),
    "inv_freq": ("12", "'12'"),
}


@pytest.mark.parametrize("name", VALUES)
def test_refuses_values(name):
    value, got = VALUES[name]
    with pytest.raises(ValueError, match=rf"^ctx.AttentionSettings: {name} must be .* got .*{got}"):
        made(**{name: value})


@pytest.mark.parametrize("name", ["rotary_base", "attention_factor", "scale", "logit_softcap"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_refuses_what_is_not_finite(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*finite.* got {value}"):
        made(**{name: value})


@pytest.mark.parametrize("name", TYPES)
def test_refuses_types(name):
    value, got = TYPES[name]
    with pytest.raises(TypeError, match=rf"^ctx.AttentionSettings: {name} must be .* got .*{got}"):
        made(**{name: value})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"slot_mass": True, "compressed_bias": "log_ratio"}, "compressed_bias .*with slot_mass"),
        ({"keys": "rotated", "position": "alibi"}, "keys must be 'plain' unless position"),
        ({"rotary_dim": 4, "inv_freq": [1.0]}, "inv_freq must be rotary_dim / 2 = 2 numbers"),
    ],
)
def test_refuses_combinations(settings, message):
    with pytest.raises(ValueError, match=f"ctx.AttentionSettings: {message}"):
        made(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rotary_dim": 10}, "rotary_dim must be even and at most head_dim = 8.* got 10"),
        ({"inv_freq": [1.0] * 3}, "inv_freq must be rotary_dim / 2 = 4 numbers, got 3"),
    ],
)
def test_refuses_what_does_not_fit_a_head(settings, message):
    for call in (made(**settings).validate, made(**settings).resolved):
        with pytest.raises(ValueError, match=message):
            call(8)
    with pytest.raises(ValueError, match=r"rotary_dim must be even .* got 7"):
        made().validate(7)
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        made().resolved(0)


def test_resolved_says_every_number():
    resolved = made().resolved(8)
    assert (resolved.rotary_dim, resolved.scale) == (8, 8**-0.5)
    assert resolved.inv_freq == tuple(10000.0 ** (-i / 4) for i in range(4))
    assert resolved.resolved(8) == resolved == made(rotary_dim=8).resolved(8)
    assert made(inv_freq=[1, 2], rotary_dim=4).resolved(8).inv_freq == (1.0, 2.0)


@pytest.mark.parametrize("position", ["relative", "alibi", None])
def test_resolved_without_rotation(position):
    resolved = made(position=position, attention_factor=2.0, rotary_dim=4).resolved(7)
    assert (resolved.rotary_dim, resolved.inv_freq, resolved.attention_factor) == (0, (), 1.0)
    assert resolved.resolved(7) == resolved


@pytest.mark.parametrize("settings", [made(), made(**EVERYTHING), made().resolved(6)])
def test_dicts_are_plain_and_come_back(settings):
    held = json.loads(json.dumps(settings.to_dict()))
    assert held == settings.to_dict()
    assert ctx.AttentionSettings.from_dict(held) == settings
    assert list(held) == list(EVERYTHING)


def test_dicts_are_checked():
    read, held = ctx.AttentionSettings.from_dict, made().to_dict()
    assert read({"schedule": held["schedule"]}) == made()
    with pytest.raises(ValueError, match=r"from_dict: names must be among .* got 'head_dim'"):
        read({**held, "head_dim": 8})
    for wrong in (None, {"windows": 3}):
        with pytest.raises(ValueError, match=r"from_dict: schedule must be a dict of .*"):
            read({**held, "schedule": wrong})
    with pytest.raises(ValueError, match="distance"):
        read({**held, "distance": "far"})


def test_reference_has_the_same_settings():
    mine = {f.name: f.default for f in dataclasses.fields(ctx.AttentionSettings)}
    theirs = {f.name: f.default for f in dataclasses.fields(reference.Settings)}
    del mine["schedule"], theirs["alibi_slopes"], theirs["relative"]
    assert mine == theirs


# --- frequencies of Hugging Face models -----------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
DEEPSEEK = {"rope_type": "yarn", "factor": 40, "rope_theta": 10000, "beta_fast": 32, "beta_slow": 1}
DEEPSEEK |= {"mscale": 1, "mscale_all_dim": 0.707}
GPT_OSS = {"rope_type": "yarn", "factor": 32.0, "rope_theta": 150000.0, "truncate": False}

# Parameters, head_dim, and what transformers 5.24 gives: five of its n frequencies (the first, at
# n / 4, n / 2, 3 n / 4, and the last) and the attention factor.
MODELS = {
    "linear": (
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        64,
        [0.25, 0.025, 0.0024999999, 0.00025000001, 3.3338038e-05],
        1.0,
    ),
    "llama3": (LLAMA3, 128, [1.0, 0.037606031, 0.00052484602, 6.6478697e-06, 3.0689259e-07], 1.0),
    "partial": (
        {**LLAMA3, "factor": 32.0, "partial_rotary_factor": 0.5},
        64,
        [1.0, 0.037606031, 0.00042955671, 1.6619674e-06, 1.419272e-07],
        1.0,
    ),
    "yarn": (
        {**YARN, "original_max_position_embeddings": 32768},
        128,
        [1.0, 0.031622779, 0.00060294115, 7.9056936e-06, 3.1023444e-07],
        1.138629436111989,
    ),
    "mscale": (
        {
            **DEEPSEEK,
            "original_max_position_embeddings": 4096,
            "mscale": 1,
            "mscale_all_dim": 0.707,
        },
        64,
        [1.0, 0.1, 0.0055000004, 2.4999999e-05, 3.3338035e-06],
        1.0857263992561355,
    ),
    "not truncated": (
        {**GPT_OSS, "original_max_position_embeddings": 4096},
        64,
        [1.0, 0.050813273, 0.00045648392, 4.0999785e-06, 3.0235114e-07],
        1.3465735902799727,
    ),
}
LONGEST = 131072


def scaled(parameters, head_dim, **settings):
    settings = {"schedule": LAW, "max_position_embeddings": LONGEST, **settings}
    return ctx.AttentionSettings.from_rope_scaling(parameters, head_dim, **settings)


@pytest.mark.parametrize("name", MODELS)
def test_stored_frequencies(name):
    parameters, head_dim, some, factor = MODELS[name]
    settings = scaled(parameters, head_dim, keys="rotated")
    n = len(settings.inv_freq)
    assert n == int(head_dim * parameters.get("partial_rotary_factor", 1.0)) // 2
    got = [settings.inv_freq[i] for i in (0, n // 4, n // 2, 3 * n // 4, n - 1)]
    assert got == pytest.approx(some, rel=1e-6)
    assert settings.attention_factor == pytest.approx(factor, rel=1e-12)
    assert (settings.rotary_dim, settings.keys) == (2 * n, "rotated")
    assert settings.rotary_base == parameters["rope_theta"]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers")
@pytest.mark.parametrize("name", MODELS)
def test_equal_to_transformers(name):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, head_dim = MODELS[name][:2]
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=LONGEST,
        rope_parameters={**parameters},
    )
    make = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    inv_freq, factor = make(config, torch.device("cpu"))
    settings = scaled(parameters, head_dim)
    assert list(settings.inv_freq) == pytest.approx(inv_freq.tolist(), rel=1e-6)
    assert settings.attention_factor == pytest.approx(factor, rel=1e-12)


def test_default_frequencies():
    want = made(rotary_dim=8, rotary_base=50.0).resolved(8)
    assert scaled({"rope_type": "default", "rope_theta": 50.0}, 8).resolved(8) == want
    assert scaled({}, 8, rotary_base=50.0).resolved(8) == want
    assert scaled(None, 8, rotary_base=50).resolved(8) == want


def test_names_of_older_models():
    """`type` for `rope_type`, and the lengths of the config where the parameters have none."""
    new = MODELS["llama3"][0]
    old = {**new, "type": "llama3"}
    del old["rope_type"], old["original_max_position_embeddings"]
    assert scaled(old, 128, max_position_embeddings=8192) == scaled(new, 128)
    yarn = {**MODELS["yarn"][0], "factor": None}
    assert scaled(yarn, 128) == scaled(MODELS["yarn"][0], 128)
    given = scaled({**yarn, "attention_factor": 1.5}, 128)
    assert given.attention_factor == 1.5


@pytest.mark.parametrize(
    "parameters, settings, message",
    [
        ({"rope_type": "dynamic", "factor": 2.0}, {}, "rope_type must be .* got 'dynamic'"),
        ({"rope_type": "longrope"}, {}, "rope_type must be .* got 'longrope'"),
        ({"rope_type": "linear"}, {}, "factor must be a positive number .*'linear', got None"),
        ({"rope_type": "linear", "factor": 0}, {}, "factor must be a positive number .* got 0"),
        ({**LLAMA3, "low_freq_factor": None}, {}, "low_freq_factor must be .* got None"),
        ({**LLAMA3, "low_freq_factor": 4.0}, {}, "high_freq_factor must be more than .* got 4"),
        ({**YARN, "rope_theta": 1.0}, {}, "rope_theta must be more than 1 .* got 1"),
        (
            {**YARN, "attention_factor": 0},
            {},
            "attention_factor must be a positive number .* got 0",
        ),
        (
            {"rope_type": "yarn", "factor": 2.0},
            {"max_position_embeddings": None},
            "original_max_position_embeddings must be .* got None",
        ),
        ({}, {"inv_freq": [1.0]}, "inv_freq must come from rope_parameters"),
        ({"partial_rotary_factor": 0.4}, {}, "rotary_dim must be even .* got 3"),
        ({"rope_theta": -1.0}, {}, "rotary_base must be positive and finite, got -1"),
    ],
)
def test_refuses_rope_parameters(parameters, settings, message):
    with pytest.raises(ValueError, match=f"^ctx.AttentionSettings.*: {message}"):
        scaled(parameters, 8, **settings)
