"""Layers of one model with memories of different sizes."""

import json

import pytest
import torch

import ctx
import test_transformer
from ctx.cli.options import sizes
from ctx.recipes.errors import RecipeError
from ctx.recipes.limits import check_fits
from ctx.recipes.settings import model_config
from test_transformer import tokens

PER_LAYER = {
    "window": [8, 4, 0],
    "compressed": (6, 0, 3),
    "ratio": [4, 1, 2],
    "segment": (8, 3, 5),
    "sinks": [0, 2, 1],
}


def config(**changed):
    return test_transformer.config(**{"num_layers": 3, **PER_LAYER, **changed})


def model(**changed):
    return test_transformer.model(**{"num_layers": 3, **PER_LAYER, **changed})


def test_every_layer_has_its_own_schedule():
    built = model()
    want = tuple(ctx.Schedule(*numbers) for numbers in zip(*PER_LAYER.values(), strict=True))
    assert built.schedules == built.config.schedules() == want
    assert tuple(layer.schedule for layer in built.layers) == want
    shapes = [layer.compressor.key_weight.shape[1] for layer in built.layers]
    assert shapes == PER_LAYER["ratio"]
    held = [layer["compressed_keys"].shape[2] > 0 for layer in built.init_memory(1)]
    assert held == [True, False, True]


def test_streaming_equals_one_differentiable_call():
    built, text = model(), tokens(2, 60)
    parallel, _ = built(text)
    memory, parts = built.init_memory(2), []
    with torch.inference_mode():
        for chunk in text.split([1, 7, 8, 1, 40, 3], 1):
            logits, memory = built(chunk, memory)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), parallel, atol=2e-5, rtol=2e-5)


def test_one_size_is_that_size_in_every_layer():
    one, each = config(window=8), config(window=[8, 8, 8])
    assert one.schedules() == each.schedules()
    uniform = {name: sizes[2] for name, sizes in PER_LAYER.items()}
    assert config(**uniform).schedule() == ctx.Schedule(**uniform)


def test_segment_may_follow_the_ratio():
    segments = [one.segment for one in config(segment=None).schedules()]
    assert segments == PER_LAYER["ratio"]


def test_a_configuration_is_plain_and_comes_back():
    first = config()
    plain = first.to_dict()
    assert plain["compressed"] == [6, 0, 3] and plain["window"] == [8, 4, 0]
    assert type(plain["compressed"]) is list
    again = ctx.CompressiveTransformerConfig.from_dict(json.loads(json.dumps(plain)))
    assert again == first and hash(again) == hash(first)
    assert again.compressed == (6, 0, 3)
    assert ctx.CompressiveTransformerConfig.from_dict({**plain, "compressed": (6, 0, 3)}) == first


def test_with_memory_takes_one_size_or_each():
    built, text = model(), tokens(2, 50)
    twin = built.with_memory(compressed=[0, 2, 5], window=3)
    assert [one.compressed for one in twin.schedules] == [0, 2, 5]
    assert [one.window for one in twin.schedules] == [3, 3, 3]
    assert built.schedules == config().schedules()
    other = ctx.CompressiveTransformer(config(compressed=[0, 2, 5], window=3)).eval()
    other.load_state_dict(built.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(text)[0], other(text)[0])
        assert not torch.allclose(twin(text)[0], built(text)[0])


def test_generation():
    built, prompt = model(), tokens(2, 90)
    out = built.generate(prompt, 20, temperature=0)
    logits, _ = built(torch.cat([prompt, out], 1))
    assert torch.equal(out, logits[:, 89:-1].argmax(-1))


@pytest.mark.parametrize(
    "changed, error, words",
    [
        ({"window": [8, 4]}, ValueError, r"Config: window must be one int or num_layers = 3 .*got"),
        ({"sinks": ()}, ValueError, r"sinks must be one int or num_layers = 3 .*got \[\]"),
        ({"compressed": [1, -2, 3]}, ValueError, r"compressed must be .*got -2 in layer 1"),
        ({"ratio": [1, 2, 0]}, ValueError, r"ratio must be .*got 0 in layer 2"),
        ({"segment": [1, 2, "x"]}, TypeError, r"segment must be .*got 'x' in layer 2"),
        ({"window": [True, 1, 1]}, TypeError, r"window must be .*got True in layer 0"),
        ({"window": "888"}, TypeError, r"window must be .*got '888'"),
        ({"window": {1, 2, 3}}, TypeError, r"window must be .*got"),
    ],
    ids=str,
)
def test_wrong_sizes_are_refused_by_name(changed, error, words):
    with pytest.raises(error, match=words):
        config(**changed)


def test_with_memory_refuses_by_name():
    built = model()
    with pytest.raises(ValueError, match=r"compressed must be one int or num_layers = 3"):
        built.with_memory(compressed=[1, 2])
    with pytest.raises(ValueError, match=r"window must be .*got -1 in layer 2"):
        built.with_memory(window=[1, 2, -1])


def test_one_schedule_is_refused_where_there_are_several():
    with pytest.raises(ValueError, match=r"schedules must be one .*got 3 different"):
        _ = model().schedule


def test_sizes_of_the_command_line():
    assert sizes("64") == 64 and sizes("64,0,8") == (64, 0, 8)
    for wrong in ("", "a", "1,", "1;2"):
        with pytest.raises(ValueError, match="int"):
            sizes(wrong)
    made = model_config({"num_layers": 2, "compressed": sizes("8,0")})
    assert [one.compressed for one in made.schedules()] == [8, 0]
    with pytest.raises(
        RecipeError, match=r"^`compressed` must be one int or `num_layers` = 3 of them"
    ):
        model_config({"compressed": (8, 0)})


def test_what_fits_counts_every_layer():
    check_fits(config(), 2, 16, training=True)
    with pytest.raises(RecipeError, match="do not fit"):
        check_fits(config(compressed=[0, 0, 2**30]), 64, 16, training=True)
