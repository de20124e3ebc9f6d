"""ctx.hf.fit on tiny models: the error that a layer is fitted by is the law's, fits are bit for bit
reproducible and go on after interruptions, and files come back as they were.
"""

import contextlib
import dataclasses
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ctx.hf
from hf_models import VOCABULARY, logits_of, model_of
from snapshot_files import sealed

transformers = pytest.importorskip("transformers", minversion="5.17", reason="needs transformers")

from ctx import engine  # noqa: E402
from ctx.hf.budgets import schedule_of  # noqa: E402
from ctx.hf.compressors import config_hash, weights_hash  # noqa: E402
from ctx.hf.fitting.excerpts import excerpts_of, random_excerpt  # noqa: E402
from ctx.hf.fitting.layer import error_of, fit_layer, problems_of  # noqa: E402
from ctx.hf.fitting.recording import record  # noqa: E402
from ctx.hf.fitting.settings import FitSettings, placements_of  # noqa: E402
from ctx.hf.fitting.whole import compressed_attention, logits_at  # noqa: E402
from ctx.hf.layer_law import laws_of  # noqa: E402

SMALL = {
    "slots": 20, "ratio": 2, "sinks": 2, "excerpts": 2, "validation": 1, "excerpt_tokens": 64,
    "queries": 12, "steps": 6, "end_to_end_steps": 3, "end_to_end_tokens": 48,
    "end_to_end_queries": 16,
}  # fmt: skip


def text(length=400, seed=3):
    """Tokens with something to remember: the same few phrases again and again."""
    torch.manual_seed(seed)
    phrases = torch.randint(2, VOCABULARY, (6, 10))
    return phrases[torch.randint(0, 6, (length // 10,))].flatten()


def fitted(model, **settings):
    return ctx.hf.fit(model, text(), **{**SMALL, **settings})


def laws_with(config, compressor, distance, schedule, heads, seed=5):
    """Laws of all layers with compressors and biases that are not their first values."""
    torch.manual_seed(seed)
    biases = torch.randn(config.num_hidden_layers, heads)
    return laws_of(
        config, [schedule] * config.num_hidden_layers, [compressor] * config.num_hidden_layers,
        "test", distance=distance, slot_mass=True, max_rewind=1, biases=biases,
    )  # fmt: skip


def shaken(law):
    for parameter in law.compressor.parameters():
        nn.init.normal_(parameter, std=0.3)


# --- the law --------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["slot", "token"])
@pytest.mark.parametrize("compressor", ["mean", "conv", "dilated", "gated", "max", "most_used"])
@pytest.mark.parametrize("family", ["llama", "phi", "cohere", "yarn", "gpt_neox"])
def test_the_error_of_a_layer_is_that_of_its_attention(family, compressor, distance):
    """What a layer is fitted by against the operators, on the model's own queries and pairs."""
    model, settings = model_of(family), FitSettings(**SMALL, compressor=compressor)
    excerpts = excerpts_of([text()], settings)
    recorded = record(model, excerpts, True, lambda: None)[1]
    heads = recorded.keys.shape[1]
    schedule = schedule_of(20, 8, 2, 2)
    laws = laws_with(model.config, compressor, distance, schedule, heads)
    law = laws[1]
    law.measure((heads, recorded.keys.shape[3], recorded.values.shape[3]), "cpu", "test")
    shaken(law)
    if compressor == "most_used":  # which the fit takes without its bias
        law.bias = torch.zeros(heads)
    chosen = [0, 2]
    with torch.no_grad():
        got = [x.error() for x in problems_of(law, recorded, excerpts.queries, chosen)]
        q, k, v = (x[chosen] for x in (recorded.every_q, recorded.keys, recorded.values))
        place = torch.arange(q.shape[2]).expand(2, -1)
        plan = engine.plans([law], None, place, None, None, False)[law.plan_key]
        out = compressed_attention(law, plan, q, k, v, recorded.scale, None)
        at = excerpts.queries[chosen][..., None, None].expand(-1, -1, *out.shape[2:])
        through = recorded.weight.T
        made = out.gather(1, at).flatten(2) @ through
        wanted = recorded.out[chosen].transpose(1, 2).flatten(2) @ through
    error = (made - wanted).square().sum((1, 2)) / wanted.square().sum((1, 2))
    assert (error > 1e-4).all()
    torch.testing.assert_close(torch.stack(got), error, rtol=2e-4, atol=1e-6)


def test_the_error_of_capped_scores():
    model = model_of("llama")
    excerpts = excerpts_of([text()], FitSettings(**SMALL))
    recorded = dataclasses.replace(record(model, excerpts, True, lambda: None)[0], softcap=0.5)
    heads = recorded.keys.shape[1]
    laws = laws_with(model.config, "gated", "slot", schedule_of(20, 8, 2, 2), heads)
    laws[0].measure((heads, recorded.keys.shape[3], recorded.values.shape[3]), "cpu", "test")
    with torch.no_grad():
        got = problems_of(laws[0], recorded, excerpts.queries, [0])[0].error()
        parts = (x[:1] for x in (recorded.every_q, recorded.keys, recorded.values))
        plan = engine.plans(laws[:1], None, torch.arange(64)[None], None, None, False)
        out = compressed_attention(
            laws[0], plan[laws[0].plan_key], *parts, recorded.scale, recorded.softcap
        )
        made = out[0, excerpts.queries[0]].flatten(1) @ recorded.weight.T
        wanted = recorded.out[0].transpose(0, 1).flatten(1) @ recorded.weight.T
    error = (made - wanted).square().sum() / wanted.square().sum()
    torch.testing.assert_close(got, error, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("distance", ["slot", "token"])
@pytest.mark.parametrize("compressor", ["gated", "most_used", "conv"])
def test_the_whole_model_says_what_it_says_with_a_cache(compressor, distance):
    model = model_of("llama")
    fit = fitted(model, compressor=compressor, distance=distance, end_to_end=True)
    fit.bias += torch.randn(fit.bias.shape)
    x = text(60, seed=8)
    cache = ctx.hf.CompressiveCache(model.config, compressor=fit)
    wanted = torch.cat([logits_of(model, cache, part[None]) for part in x.split(7)], 1)[0]
    laws = laws_of(
        model.config, fit.schedules, [*fit.compressors], "test", distance=distance,
        slot_mass=True, max_rewind=1, biases=fit.bias,
    )  # fmt: skip
    for law in laws:
        law.measure((fit.compressors[0].kv_heads, 8, 8), torch.device("cpu"), "test")
    with torch.no_grad():
        got = logits_at(model, laws, x, torch.arange(60))
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


def test_gradients_of_the_whole_model_are_differences():
    model = model_of("llama", dtype=torch.float64)
    schedule = schedule_of(20, 8, 2, 2)
    laws = laws_with(model.config, "gated", "token", schedule, 2)
    for law in laws:
        law.measure((2, 8, 8), torch.device("cpu"), "test")
        law.compressor.double()
        shaken(law)
        law.bias = law.bias.double().requires_grad_()
    x, at = text(50), torch.arange(30, 50)
    model.requires_grad_(False)

    def loss():
        return logits_at(model, laws, x, at).double().logsumexp(-1).square().mean()

    parameters = [laws[0].bias, laws[0].compressor.key_gate, laws[1].compressor.value_position]
    grads = torch.autograd.grad(loss(), parameters)
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=True):
            step = torch.zeros_like(parameter)
            step.view(-1)[0] = 1e-3
            parameter += step
            above = loss()
            parameter -= 2 * step
            below = loss()
            parameter += step
            assert abs(float((above - below) / 2e-3 - grad.view(-1)[0])) < 1e-4
            assert grad.abs().max() > 1e-4


# --- the fit --------------------------------------------------------------------------------------


def numbers_of(fit):
    return {name: x.clone() for name, x in fit.state_dict().items()}


def same(one, other):
    assert one.schedules == other.schedules
    a, b = numbers_of(one), numbers_of(other)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_fit_helps_and_leaves_the_model_as_it_was():
    model = model_of("llama", "sdpa")
    model.train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    fit = fitted(model, steps=20, end_to_end=True, end_to_end_steps=12)
    assert model.training and all(x.requires_grad for x in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])
    assert fit.slots == 20 and len(fit.schedules) == 2
    assert not any(x.requires_grad for x in fit.parameters())
    assert any(schedule.compressed for schedule in fit.schedules)
    for layer, schedule in zip(fit.report["layers"], fit.schedules, strict=True):
        errors = layer["validation"]
        assert layer["placement"] == errors.index(min(errors))
        assert bool(schedule.compressed) == (layer["placement"] > 0)
    assert len(fit.report["end_to_end"]) == 12


def divergence(model, fit, x):
    """KL(full ‖ compressed) of tokens behind the first 28, by the two caches."""
    full = ctx.hf.CompressiveCache(model.config, window=len(x), compressed=0)
    small = ctx.hf.CompressiveCache(model.config, compressor=fit)
    said = [logits_of(model, cache, x[None])[0, 28:].log_softmax(-1) for cache in (full, small)]
    return nn.functional.kl_div(said[1], said[0], reduction="batchmean", log_target=True).item()


def test_the_end_to_end_fit_lowers_what_it_is_said_to():
    model, x = model_of("llama"), text(240)
    settings = {"end_to_end_tokens": 240, "end_to_end_queries": 212, "excerpt_tokens": 80}
    fits = [
        ctx.hf.fit(model, x, **{**SMALL, **settings, **more})
        for more in ({}, {"end_to_end": True, "end_to_end_steps": 30})
    ]
    first = divergence(model, fits[0], x)
    assert fits[1].report["end_to_end"][0] == pytest.approx(first, rel=1e-3)
    assert divergence(model, fits[1], x) < 0.9 * first


def test_more_steps_give_a_smaller_error_on_what_is_fitted():
    model, settings = model_of("llama"), FitSettings(**SMALL)
    excerpts = excerpts_of([text()], settings)
    recorded = record(model, excerpts, False, lambda: None)[0]
    errors = []
    for steps in (0, 10, 60):
        law = laws_with(model.config, "gated", "slot", schedule_of(20, 8, 2, 2), 2)[0]
        law.bias = torch.zeros(2, requires_grad=True)
        law.measure((2, 8, 8), torch.device("cpu"), "test")
        problems = problems_of(law, recorded, excerpts.queries, excerpts.training)
        fit_layer(law, problems, steps, 3e-2)
        errors.append(error_of(problems))
    assert errors[0] > errors[1] > errors[2]


def test_bit_for_bit_and_another_seed():
    model = model_of("qwen2")
    first = fitted(model, end_to_end=True)
    same(first, fitted(model, end_to_end=True))
    other = fitted(model, end_to_end=True, seed=1)
    assert not torch.equal(first.bias, other.bias)


class StopError(Exception):
    pass


@pytest.mark.parametrize("stage, at", [("record", 2), ("layers", 1), ("end to end", 1),
                                       ("end to end", 2)])  # fmt: skip
def test_goes_on_where_it_was_interrupted(tmp_path, stage, at):
    model = model_of("llama")
    whole = fitted(model, end_to_end=True)
    file = tmp_path / "partial"
    seen = []

    def stop(now, done, total, said):
        seen.append((now, done))
        if (now, done) == (stage, at):
            raise StopError

    with pytest.raises(StopError):
        fitted(model, end_to_end=True, partial=file, progress=stop)
    assert model.config._attn_implementation == "ctx"
    assert file.exists() == (stage != "record")
    with (
        pytest.raises(ValueError, match="same model, texts and settings")
        if file.exists()
        else (contextlib.nullcontext())
    ):
        fitted(model, end_to_end=True, partial=file, seed=9)
    if not file.exists():
        return
    stages = []
    resumed = fitted(
        model, end_to_end=True, partial=file, progress=lambda *said: stages.append(said[0])
    )
    same(resumed, whole)
    assert resumed.report == whole.report
    assert not file.exists()
    if stage == "end to end":
        assert set(stages) == {"end to end"}


def test_a_damaged_partial_file_is_refused(tmp_path):
    file = tmp_path / "partial"
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="partial must be a file of an interrupted fit"):
        fitted(model_of("llama"), partial=file)
    assert file.read_bytes() == b"something else"


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_models(family, dtype):
    """Sliding layers stay as they are; parameters of a bfloat16 model's fit are float32."""
    model = model_of(family, dtype=dtype)
    fit = fitted(model, end_to_end=True)
    own = 1 if family == "gemma2" else 2
    assert len(fit.schedules) == own
    assert all(x.dtype == torch.float32 for x in fit.parameters())
    cache = ctx.hf.CompressiveCache(model.config, compressor=fit)
    x = text(60)[None]
    one = logits_of(model, cache, x, 9)
    cache.reset()
    torch.testing.assert_close(
        one, logits_of(model, cache, x), rtol=0, atol=2e-5 if dtype == torch.float32 else 0.5
    )


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", ["gated", "conv", "dilated", "mean", "most_used"])
def test_files(tmp_path, compressor):
    model = model_of("llama")
    fit = fitted(model, compressor=compressor)
    file = tmp_path / "fit.safetensors"
    fit.save(file)
    for loaded in (ctx.hf.load_compressors(file), ctx.hf.load_compressors(file, model)):
        same(loaded, fit)
        assert loaded.report == json.loads(json.dumps(fit.report))
        assert not any(x.requires_grad for x in loaded.parameters())
        x, caches = text(60)[None], []
        for compressors in (fit, loaded):
            caches.append(ctx.hf.CompressiveCache(model.config, compressor=compressors))
        assert torch.equal(logits_of(model, caches[0], x), logits_of(model, caches[1], x))
    assert [p.name for p in tmp_path.iterdir()] == ["fit.safetensors"]


def test_a_compressor_of_ones_own(tmp_path):
    class Last(ctx.compression.Compressor):
        name = "test_last"

        def parameter_shapes(self):
            return {"weight": (self.kv_heads, self.ratio)}

        def forward(self, keys, values):
            weight = torch.softmax(self.weight, 1)[:, None, :, None].to(keys.dtype)
            return (keys * weight).sum(3), (values * weight).sum(3)

    ctx.compression.register(Last)
    try:
        model = model_of("llama")
        fit = fitted(model, compressor="test_last", end_to_end=True)
        assert any(x.weight.abs().max() > 0 for x in fit.compressors if isinstance(x, Last))
        fit.save(tmp_path / "own")
        same(ctx.hf.load_compressors(tmp_path / "own", model), fit)
    finally:
        del ctx.compression.COMPRESSORS["test_last"]
    with pytest.raises(ValueError, match="compressors must be of registered classes"):
        fit.save(tmp_path / "again")
    assert [p.name for p in tmp_path.iterdir()] == ["own"]


def test_files_of_others_are_refused(tmp_path):
    model, file = model_of("llama"), tmp_path / "fit"
    fitted(model).save(file)
    other = model_of("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += 1
    with pytest.raises(ValueError, match="model must have the weights"):
        ctx.hf.load_compressors(file, other)
    with pytest.raises(ValueError, match="compressor must have been fitted to this model"):
        ctx.hf.CompressiveCache(model_of("qwen3").config, compressor=ctx.hf.load_compressors(file))
    ctx.hf.load_compressors(file, model.to(torch.bfloat16))  # the same weights, rounded
    data = file.read_bytes()
    other = data.replace(b"compressors/1", b"compressors/9")
    for wrong in (b"", b"nothing", data[:-40], other, sealed(other)):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match="path must be a"):
            ctx.hf.load_compressors(file)
    with pytest.raises(ValueError, match=r"of format ctx.*rs/1, got 'ctx.*rs/9'"):
        ctx.hf.load_compressors(file)
    with pytest.raises(FileNotFoundError):
        ctx.hf.load_compressors(tmp_path / "missing")


def test_sizes_are_the_fits_own():
    model = model_of("llama")
    fit = fitted(model)
    for name, value in (("window", 8), ("ratio", 2), ("distance", "slot"), ("slot_mass", True)):
        with pytest.raises(ValueError, match=f"{name} must be left out"):
            ctx.hf.CompressiveCache(model.config, compressor=fit, **{name: value})
    with pytest.raises(TypeError, match="window must be given"):
        ctx.hf.CompressiveCache(model.config)


# --- settings and texts ---------------------------------------------------------------------------


def test_placements():
    made = placements_of(FitSettings())
    assert [x.compressed for x in made] == [0, 60, 124, 252]
    assert {x.max_slots for x in made} == {512}
    assert [x.compressed for x in placements_of(FitSettings(slots=12, ratio=2))] == [0, 2]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 8))
def test_excerpts_are_disjoint_and_spread(lengths, number):
    texts = [torch.arange(n) + 100 * i for i, n in enumerate(lengths)]
    settings = FitSettings(
        slots=7,
        ratio=2,
        sinks=1,
        excerpts=number,
        validation=1,
        excerpt_tokens=16,
        queries=4,
        end_to_end_tokens=16,
    )
    room = sum(n // 16 for n in lengths)
    if room < number + 1:
        with pytest.raises(ValueError, match=f"got {room}"):
            excerpts_of(texts, settings)
        return
    made = excerpts_of(texts, settings)
    assert len(made.tokens.flatten().unique()) == (number + 1) * 16
    assert len(made.validating) == 1 and len(made.training) == number
    assert ((made.queries >= 15) & (made.queries < 16)).all()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(0, 999))
def test_random_excerpts(lengths, seed):
    texts = [torch.arange(n) + 100 * i for i, n in enumerate(lengths)]
    generator = torch.Generator().manual_seed(seed)
    if max(lengths) < 12:
        with pytest.raises(ValueError, match="at least 12 tokens in one"):
            random_excerpt(texts, 12, 3, 5, generator)
        return
    tokens, at = random_excerpt(texts, 12, 3, 5, generator)
    text_of = texts[int(tokens[0]) // 100]
    begin = int(tokens[0]) % 100
    assert torch.equal(tokens, text_of[begin : begin + 12])
    assert len(at) == 3 and (at >= 5).all() and (at < 12).all() and (at.diff() > 0).all()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"slots": 4}, "slots must be at least 5"),
        ({"ratio": 1}, "ratio must be at least 2"),
        ({"compressor": "median"}, "compressor must be one of"),
        ({"distance": "far"}, "distance must be 'slot' or 'token'"),
        ({"allocation": "fair"}, "allocation must be 'equal' or 'measured', got 'fair'"),
        ({"slots": 8, "allocation": "measured"}, "slots must be at least 5"),
        ({"steps": 1.5}, "steps must be an int"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"end_to_end": 1}, "end_to_end must be"),
        ({"excerpt_tokens": 28}, "excerpt_tokens must be more than slots + 8 = 28"),
        ({"excerpt_tokens": 1000}, "max_position_embeddings = 256"),
        ({"excerpts": 40}, "41 disjoint parts of 64 tokens"),
        ({"speed": 3}, "'speed'"),
        ({"tokenizer": None, "texts": "words"}, "tokenizer must be given"),
        ({"texts": torch.zeros(4)}, "texts must be str or integer tensors"),
        ({"texts": []}, "texts must be at least one"),
        ({"model": nn.Linear(2, 2)}, "model must be a transformers model"),
    ],
)  # fmt: skip
def test_bad_settings(settings, said):
    settings = {"model": model_of("llama"), "texts": text(), **SMALL, **settings}
    with pytest.raises((ValueError, TypeError), match=re.escape(said)):
        ctx.hf.fit(settings.pop("model"), settings.pop("texts"), **settings)


def test_texts_of_words():
    class Tokenizer:
        def __call__(self, words, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [int(word) for word in words.split()]}

    model, x = model_of("llama"), text()
    words = " ".join(map(str, x.tolist()))
    fit = ctx.hf.fit(model, [words], tokenizer=Tokenizer(), **SMALL)
    same(fit, fitted(model))


@pytest.mark.parametrize(
    "family, name",
    [("llama", "o_proj"), ("gemma2", "o_proj"), ("gpt_neox", "dense"), ("phi", "dense")],
)
def test_weights_that_outputs_go_through(family, name):
    model = model_of(family)
    excerpts = excerpts_of([text()], FitSettings(**SMALL))
    recorded = record(model, excerpts, False, lambda: None)[-1]
    assert any(
        x.data_ptr() == recorded.weight.data_ptr()
        for at, x in model.named_parameters()
        if at.endswith(f"{name}.weight")
    )


def test_hashes():
    model = model_of("llama")
    assert weights_hash(model) == weights_hash(model.to(torch.bfloat16))
    assert config_hash(model.config) != config_hash(model_of("qwen3").config)
    assert config_hash(model.config) == config_hash(type(model.config)(**model.config.to_dict()))
