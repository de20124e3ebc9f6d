"""ctx.hf: a cache for Hugging Face models, its attention, and what both refuse."""

import copy
import subprocess
import sys
import threading

import pytest
import torch

import ctx
import ctx.hf
from command_line import environment
from ctx import reference
from hf_models import (
    FAMILIES,
    exact_cache,
    full_cache,
    left_padded,
    logits_of,
    model_of,
    small_cache,
    tokens,
    transformers,
)

pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")

ATTENTIONS = ["sdpa", "eager", "ctx"]
CUTS = [1, 7, 16, None]


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# --- nothing evicted: the same as transformers' own -----------------------------------------------


def reference_attention(family, attention):
    """transformers' own that computes what is asked for."""
    return (
        "eager" if family in ("gemma2", "gpt_oss") else "sdpa" if attention == "ctx" else attention
    )


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_as_dynamic_cache(family, attention):
    if family in ("gemma2", "gpt_oss") and attention == "sdpa":
        pytest.skip("transformers' sdpa has no soft cap and no sink logits")
    ours = model_of(family, attention)
    theirs = model_of(family, reference_attention(family, attention))
    for mask in (None, left_padded(tokens(2, 24), 0, 9)[1]):
        x = tokens(1 if mask is None else 2, 24)
        wanted = logits_of(theirs, full_cache(theirs), x, 10, mask)
        got = logits_of(ours, exact_cache(ours), x, 10, mask)
        real = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
        close(got[real], wanted[real])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_a_cache_the_attention_is_plain(family):
    ours, theirs = model_of(family), model_of(family, "eager")
    x, mask = left_padded(tokens(2, 20), 0, 7)
    with torch.no_grad():
        for given in (None, mask):
            got, wanted = (m(x, attention_mask=given).logits for m in (ours, theirs))
            real = mask.bool()
            close(got[real], wanted[real])
    got, wanted = (logits_of(m, full_cache(m), x, 6, mask) for m in (ours, theirs))
    close(got[mask.bool()], wanted[mask.bool()])


def test_plain_attention_trains():
    model = model_of("llama")
    x = tokens(2, 12)
    gradients = []
    for attention in ("ctx", "sdpa"):
        model.set_attn_implementation(attention)
        model.zero_grad()
        model(x, labels=x).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad.clone())
    close(*gradients, atol=1e-5)


def test_compressed_0_is_plain_attention():
    model = model_of("llama")
    cache = ctx.hf.CompressiveCache(model.config, window=64, compressed=0)
    x = tokens(1, 60)
    close(logits_of(model, cache, x, 11), logits_of(model, full_cache(model), x))


# --- the law --------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["slot", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cuts_give_the_same(family, distance):
    model = model_of(family)
    x = tokens(1, 75)
    outs = [logits_of(model, small_cache(model, distance=distance), x, cut) for cut in CUTS]
    for out in outs[:-1]:
        close(out, outs[-1])
    assert (outs[-1] - logits_of(model, full_cache(model), x)).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("distance", ["slot", "token"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "yarn", "cohere"])
def test_other_attentions_compute_the_law_in_small_calls(family, distance, attention):
    options = {"distance": distance, "slot_mass": False, "segment": 8}
    ours, theirs = model_of(family), model_of(family, attention)
    x = tokens(1, 80)
    wanted = logits_of(ours, small_cache(ours, **options), x)
    for cut in (1, 4, 8):
        close(logits_of(theirs, small_cache(theirs, **options), x, cut), wanted)


@pytest.mark.parametrize("compressed_dtype", [None, torch.int8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype, compressed_dtype):
    if dtype == torch.float64 and compressed_dtype:
        pytest.skip("a float64 memory has one dtype")
    options = {"compressed_dtype": compressed_dtype}
    model = model_of("llama", "ctx", dtype)
    x = tokens(1, 60)
    outs = [logits_of(model, small_cache(model, **options), x, cut) for cut in (1, 16, None)]
    assert outs[0].dtype == dtype
    error = 0.3 if dtype == torch.bfloat16 else 1e-9
    for out in outs[1:]:
        assert (out - outs[0]).abs().max() <= error * outs[0].abs().max()
    wide = small_cache(model, dtype=torch.float32)
    logits_of(model, wide, x)
    assert wide.memory.rings[0][0].dtype == torch.float32


@pytest.mark.parametrize("distance", ["slot", "token"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "phi", "cohere", "yarn"])
def test_equals_the_reference_fed_with_the_models_own_pairs(family, distance, monkeypatch):
    """Every full-attention layer's outputs, of queries, keys and values as the model made them."""
    model = model_of(family)
    seen = {}
    attend = ctx.hf.stream.Stream.attend

    def recording(self, layer, q, k, v, mask, position_ids, scale, softcap, *sinks):
        out = attend(self, layer, q, k, v, mask, position_ids, scale, softcap, *sinks)
        seen.setdefault(layer, []).append((q, k, v, out.transpose(1, 2), scale, softcap))
        return out

    monkeypatch.setattr(ctx.hf.stream.Stream, "attend", recording)
    cache = small_cache(model, distance=distance, segment=3, compressed=3)
    logits_of(model, cache, tokens(2, 42), 5)
    assert len(seen) == cache.memory.layers
    for layer, law in enumerate(cache._stream.laws):
        q, k, v, out = (torch.cat(parts, 2) for parts in [*zip(*seen[layer], strict=True)][:4])
        scale, softcap = seen[layer][0][4:]
        settings = law.settings
        options = {
            "keys": "rotated", "distance": distance, "scale": scale, "logit_softcap": softcap,
            "slot_mass": True, "rotary_dim": settings.rotary_dim, "inv_freq": settings.inv_freq,
            "rotary_interleaved": settings.rotary_interleaved,
            "attention_factor": settings.attention_factor,
        }  # fmt: skip
        sizes = (2, k.shape[1], k.shape[3], v.shape[3])
        memory = reference.KVMemory(reference.Schedule(*law.schedule.numbers), *sizes, **options)
        plain = memory.rotary.unrotate(q, torch.arange(q.shape[2]).expand(2, 1, -1))
        close(out, memory.step(plain, k, v), atol=2e-4)
        close(cache.memory.seen, memory.seen)


def test_frequencies_are_the_models():
    for family in FAMILIES:
        model = model_of(family)
        body = getattr(model, model.base_model_prefix)
        cache = small_cache(model)
        settings = cache._stream.laws[0].settings
        close(torch.tensor(settings.inv_freq), body.rotary_emb.inv_freq, atol=1e-6)
        assert settings.attention_factor == pytest.approx(body.rotary_emb.attention_scaling)


@pytest.mark.parametrize("family", FAMILIES)
def test_rotation_is_the_models(family, monkeypatch):
    """Of a text that repeats one token all keys and queries are the same but for their rotation."""
    model = model_of(family)
    seen = []
    attend = ctx.hf.stream.Stream.attend

    def recording(self, layer, q, k, *rest):
        seen.append((q, k))
        return attend(self, layer, q, k, *rest)

    monkeypatch.setattr(ctx.hf.stream.Stream, "attend", recording)
    cache = small_cache(model)
    logits_of(model, cache, torch.full((1, 40), 7))
    positions = torch.arange(40.0)[None]
    for law, rotated in zip(cache._stream.laws, seen, strict=True):
        for x in rotated:
            plain = ctx.engine.rotary(x, -positions, law.unrotating)
            close(plain, plain[:, :, :1].expand_as(x))
            assert (x - x[:, :, :1]).abs().max() > 1e-2


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "phi"])
def test_padded_rows_are_rows_alone(family, positions):
    """Padding is not folded into slots, whatever the model rotates its keys by."""
    model = model_of(family)
    x, mask = left_padded(tokens(3, 50), 0, 13, 37)
    cache = small_cache(model)
    if positions:
        outs = logits_of(model, cache, x, 20, mask)
    else:
        with torch.no_grad():
            outs = model(x, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    for row, count in enumerate(mask.sum(1).tolist()):
        alone = logits_of(model, small_cache(model), x[row : row + 1, 50 - count :], 9)
        close(outs[row, 50 - count :], alone[0])
    assert cache.memory.seen.tolist() == mask.sum(1).tolist()
    assert cache.get_seq_length() == 50


def test_padding_between_turns():
    model = model_of("llama")
    x, mask = left_padded(tokens(2, 40), 0, 5)
    mask[0, 20:29] = 0  # the second turn of the first row is shorter
    cache = small_cache(model)
    outs = logits_of(model, cache, x, 20, mask)
    real = mask[0].bool()
    close(outs[0, real], logits_of(model, small_cache(model), x[:1, real])[0])


def test_layers_of_different_sizes_and_compressors():
    model = model_of("llama")
    options = {"window": [4, 12], "compressed": [9, 0], "sinks": [0, 3]}
    options["compressor"] = [ctx.compression.Gated(2, 4, 8), "max"]
    x = tokens(2, 50)
    whole, cut = (logits_of(model, small_cache(model, **options), x, n) for n in (None, 3))
    close(whole, cut)


@pytest.mark.parametrize("compressor", [*ctx.compression.COMPRESSORS, "own"])
def test_compressors(compressor):
    class Own(torch.nn.Module):
        def forward(self, keys, values):
            return keys[..., -1, :], values.mean(-2)

    model = model_of("llama")
    made = Own() if compressor == "own" else compressor
    x = tokens(1, 50)
    outs = [logits_of(model, small_cache(model, compressor=made), x, cut) for cut in (None, 3)]
    close(*outs)


def test_sliding_layers_keep_transformers_own():
    cache = small_cache(model_of("gemma2"))
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "CompressiveLayer"]
    assert cache.is_sliding == [True, False]


def test_memory_is_bounded():
    model = model_of("llama")
    cache = small_cache(model)
    logits_of(model, cache, tokens(1, 3))
    before = cache.nbytes
    logits_of(model, cache, tokens(1, 300))
    assert cache.nbytes == before > 0
    assert cache.get_seq_length() == 303


# --- faults of neighbours -------------------------------------------------------------------------


def test_crop_equals_never_having_come():
    model = model_of("llama")
    x = tokens(1, 60)
    cache = small_cache(model, max_rewind=16)
    logits_of(model, cache, x[:, :50], 7)
    cache.crop(-14)
    assert cache.get_seq_length() == 36
    got = logits_of(model, cache, x[:, 36:])
    close(got, logits_of(model, small_cache(model), x)[:, 36:])


def test_crop_past_overwritten_rows_is_refused():
    model = model_of("llama")
    cache = small_cache(model, max_rewind=4)
    logits_of(model, cache, tokens(1, 50))
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match=r"tokens must be .* got 5"):
        cache.crop(-5)
    with pytest.raises(ValueError, match="tokens_to_remove must be minus the number"):
        cache.crop(5)
    cache.crop(0)
    assert cache.get_seq_length() == 50
    assert all(map(torch.equal, before.memory.rings[0], cache.memory.rings[0]))
    assert torch.equal(before.memory.rewindable, cache.memory.rewindable)


def test_crop_stops_at_padding_and_before_the_first_token():
    model = model_of("llama")
    x, mask = left_padded(tokens(2, 12), 0, 5)
    cache = small_cache(model)
    logits_of(model, cache, x, 10, mask)
    with pytest.raises(ValueError, match="tokens_to_remove must not reach back to padding"):
        cache.crop(-3)
    cache.crop(-2)
    assert cache.memory.seen.tolist() == [10, 5]
    with pytest.raises(ValueError, match="tokens_to_remove"):
        cache.crop(-1)


def test_crop_is_all_or_nothing_over_other_layers():
    model = model_of("gemma2")
    cache = small_cache(model)
    logits_of(model, cache, tokens(1, 30))
    with pytest.raises(RuntimeError, match="crop"):  # transformers' sliding layers, unprepared
        cache.crop(-2)
    assert cache.memory.seen.tolist() == [30] and cache.get_seq_length(1) == 30
    assert cache.memory.rewindable.tolist() != [28]


@pytest.mark.parametrize("compressed_dtype", [None, torch.int8])
def test_restored_state_is_the_state(tmp_path, compressed_dtype):
    model = model_of("llama")
    x, mask = left_padded(tokens(2, 60), 3, 0)
    options = {"compressed_dtype": compressed_dtype}
    cache = small_cache(model, **options)
    logits_of(model, cache, x[:, :40], 9, mask[:, :40])
    cache.save(tmp_path / "cache")
    restored, forked = small_cache(model, **options), cache.fork()
    restored.load(tmp_path / "cache")
    loaded = small_cache(model, **options)
    loaded.load_state_dict(cache.state_dict())
    loaded.load_state_dict(loaded.state_dict())  # which aliases what is replaced
    assert loaded.memory.seen.tolist() == [37, 40]
    late, full = x[:, 40:], mask
    outs = []
    for one in (cache, restored, forked, loaded):
        assert one.get_seq_length() == 40
        with torch.no_grad():
            ids = (full.cumsum(1) - 1)[:, 40:]
            outs.append(
                model(
                    late, attention_mask=full, position_ids=ids, past_key_values=one, use_cache=True
                ).logits
            )
    assert all(torch.equal(out, outs[0]) for out in outs[1:])
    with pytest.raises(ValueError, match="memory must be made for window=9"):
        small_cache(model, window=9).load(tmp_path / "cache")
    with pytest.raises(ValueError, match="state must be what state_dict returns"):
        restored.load_state_dict({"columns": 3})


def test_a_fork_goes_its_own_way():
    model = model_of("gemma2")
    x = tokens(1, 60)
    cache = small_cache(model)
    logits_of(model, cache, x[:, :40])
    fork = cache.fork()
    logits_of(model, fork, tokens(1, 20, seed=7))
    wanted = logits_of(model, small_cache(model), x)[:, 40:]
    close(logits_of(model, cache, x[:, 40:]), wanted)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_reset_cache_is_a_new_one(family):
    model = model_of(family)
    cache = small_cache(model)
    logits_of(model, cache, tokens(1, 40, seed=3))
    cache.reset()
    assert cache.get_seq_length() == 0
    x = tokens(2, 40)  # of another batch, too
    close(logits_of(model, cache, x), logits_of(model, small_cache(model), x))


def test_conversations_in_threads_do_not_mix():
    model = model_of("llama")
    texts = [tokens(1, 60, seed) for seed in range(4)]
    wanted = [logits_of(model, small_cache(model), x, 3) for x in texts]
    got = [None] * 4

    def work(index):
        got[index] = logits_of(model, small_cache(model), texts[index], 3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, got, wanted))


def test_interrupted_calls_have_not_happened(monkeypatch):
    model = model_of("llama")
    x = tokens(1, 40)
    cache = small_cache(model)
    logits_of(model, cache, x[:, :30])
    mlp = model.model.layers[0].mlp
    hook = mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits_of(model, cache, tokens(1, 5, seed=9))
    hook.remove()
    assert cache.get_seq_length() == 30
    wanted = logits_of(model, small_cache(model), x)[:, 30:]
    close(logits_of(model, cache, x[:, 30:]), wanted)


@pytest.mark.parametrize("attention", ["ctx", "sdpa"])
def test_interrupted_calls_that_overwrite_are_refused_until_reset(attention):
    model = model_of("llama", attention)
    options = {"max_rewind": 4, "segment": 64, "slot_mass": False}
    x = tokens(1, 40)
    cache = small_cache(model, **options)
    logits_of(model, cache, x)
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits_of(model, cache, tokens(1, 20, seed=9))
    hook.remove()
    with pytest.raises(ValueError, match="memory"):
        logits_of(model, cache, x[:, :1])
    cache.reset()
    close(logits_of(model, cache, x), logits_of(model, small_cache(model, **options), x))


# --- what is refused, by name ---------------------------------------------------------------------


def refused(attention, match, x=None, *, cut=None, before=0, family="llama", mask=None, **options):
    """A call is refused in these words, and what the cache held is as it was."""
    model = model_of(family, attention)
    cache = small_cache(model, **options)
    x = tokens(1, 40) if x is None else x
    if before:
        logits_of(model, cache, x[:, :before], cut)
    with pytest.raises(ValueError, match=match):
        logits_of(model, cache, x[:, before:], mask=mask)
    assert cache.get_seq_length() == before
    if cache.memory is not None:
        assert cache.memory.seen.tolist() == [before] * len(x)


INSTEAD = r'or call ctx\.hf\.register\(\); model\.set_attn_implementation\("ctx"\)'


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_the_cache_alone_refuses(attention):
    refused(attention, f"must not reach over an eviction.*{INSTEAD}", slot_mass=False)
    refused(attention, f"slot_mass must be False.*{INSTEAD}", before=16, x=tokens(1, 20))
    refused(attention, f"batch must be 1 once tokens leave.*{INSTEAD}", x=tokens(2, 40))
    refused(attention, f"compressor must not be 'most_used'.*{INSTEAD}", compressor="most_used")
    refused(attention, f"must be one int for all layers.*{INSTEAD}", window=[8, 12])


def test_a_padded_batch_that_goes_on_without_the_attention_is_refused():
    model = model_of("llama")
    x, mask = left_padded(tokens(2, 12), 0, 5)
    cache = small_cache(model)
    logits_of(model, cache, x, mask=mask)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=f"batch must not be padded.*{INSTEAD}"):
        logits_of(model, cache, tokens(2, 1))


def test_masks_that_do_not_fit_are_refused():
    model = model_of("llama")
    x, mask = left_padded(tokens(2, 20), 0, 5)
    cache = small_cache(model)
    logits_of(model, cache, x, mask=mask)

    def step(given, **arguments):
        with torch.no_grad():
            model(tokens(2, 1), attention_mask=given, past_key_values=cache, **arguments)

    with pytest.raises(ValueError, match=r"attention_mask must be \[B, tokens so far\] = \[2, 21"):
        step(torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"as many tokens in its first 20 columns.*15"):
        step(torch.ones(2, 21))
    with pytest.raises(TypeError, match=r"attention_mask must be .* without a shape of its own"):
        step(torch.ones(2, 1, 1, 21, dtype=torch.bool))
    assert cache.memory.seen.tolist() == [20, 15]


def test_what_the_attention_refuses():
    model = model_of("llama")
    x = tokens(1, 12)
    with pytest.raises(ValueError, match=r"keys must not require a gradient.*torch\.no_grad"):
        model(x, past_key_values=small_cache(model))
    with torch.no_grad():
        with pytest.raises(ValueError, match="position_ids must go on by one per token"):
            model(x, position_ids=x, past_key_values=small_cache(model))
        model.config.attention_dropout = 0.5
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        model.train()
        with pytest.raises(ValueError, match=r"dropout must be 0 over a memory, got 0\.5"):
            model(x, past_key_values=small_cache(model))
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    attend = ctx.hf.attention.attention
    with pytest.raises(ValueError, match="position_bias must be None"):
        attend(model, q, k, k, None, position_bias=torch.zeros(2))
    with pytest.raises(ValueError, match="output_attentions must be False"):
        attend(model, q, k, k, None, output_attentions=True)


def test_padding_without_positions_is_refused():
    cache = small_cache(model_of("llama"))
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    carrying, _ = cache.update(k, k, 0)
    mask = left_padded(tokens(2, 5), 2, 0)[1]
    with pytest.raises(ValueError, match="position_ids must reach the attention"):
        ctx.hf.attention.attention(torch.nn.Module(), q, carrying, k, mask)
    assert cache.get_seq_length() == 0


def test_another_batch_is_refused_until_reset():
    model = model_of("llama")
    cache = small_cache(model)
    logits_of(model, cache, tokens(1, 10))
    with pytest.raises(ValueError, match="batch must be that of the cache, 1 rows"):
        logits_of(model, cache, tokens(2, 10))


def test_a_config_that_is_not_the_models_own_is_noticed():
    model = model_of("llama")
    other = copy.deepcopy(model.config)
    model.set_attn_implementation("sdpa")
    cache = ctx.hf.CompressiveCache(other, window=8, compressed=6)
    with pytest.raises(RuntimeError, match="config must be the model's own"):
        logits_of(model, cache, tokens(1, 10))


def config(name, **settings):
    return getattr(transformers, f"{name}Config")(**settings)


class OwnConfig(transformers.LlamaConfig):
    """A model from elsewhere, of whose rotation nothing is known."""

    model_type = "own"


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: config("GPT2"), "config must be of a model with rotary positions"),
        (lambda: config("Bloom"), "config must be of a model with rotary positions"),
        (lambda: config("T5"), "config must be of a model without an encoder and a decoder"),
        (lambda: config("Mamba"), "config must"),
        (lambda: config("DeepseekV3"), r"config must be of a model without latent attention"),
        (lambda: config("Cohere2"), "rotates the keys of all its full-attention layers"),
        (lambda: config("SmolLM3"), "rotates the keys of all its full-attention layers"),
        (lambda: config("Mistral", sliding_window=8), "config must have full-attention layers"),
        (lambda: OwnConfig(), "rotary_interleaved must say"),
    ],
)
def test_models_that_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        ctx.hf.CompressiveCache(make(), window=8, compressed=4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_scaling_that_changes_with_the_length_is_refused(kind):
    made = model_of("llama").config
    made.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match=f"rope_type must be one of .* got '{kind}'"):
        ctx.hf.CompressiveCache(made, window=8, compressed=4)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"window": -1}, "window"),
        ({"window": [8, 8, 8]}, "window must be one int or"),
        ({"ratio": 0}, "ratio"),
        ({"compressor": "median"}, "compressor"),
        ({"compressor": ["mean"]}, "compressor must be one or 2"),
        ({"distance": "far"}, "distance must be one of"),
        ({"max_rewind": 0}, "max_rewind must be at least 1"),
    ],
)
def test_settings_that_are_refused(options, match):
    model = model_of("llama")
    with pytest.raises(ValueError, match=match):
        logits_of(model, small_cache(model, **options), tokens(1, 3))


def test_types_that_are_refused():
    for options, match in (
        ({"compressor": 3}, "compressor must be a name or a module"),
        ({"dtype": "float32"}, r"dtype must be a torch\.dtype"),
        ({"slot_mass": 1}, "slot_mass must be a bool"),
    ):
        with pytest.raises(TypeError, match=match):
            small_cache(model_of("llama"), **options)
    with pytest.raises(TypeError, match="config must be the model's"):
        ctx.hf.CompressiveCache({}, window=8, compressed=4)


# --- imports --------------------------------------------------------------------------------------


def test_the_library_does_not_import_transformers():
    lines = "import sys, ctx, ctx.hf; assert 'transformers' not in sys.modules; dir(ctx.hf)"
    done = subprocess.run(
        [sys.executable, "-c", lines], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_without_transformers_the_message_says_what_to_install():
    lines = (
        "import sys; sys.modules['transformers'] = None\n"
        "import ctx.hf\n"
        "try:\n    ctx.hf.CompressiveCache\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", lines], env=environment(), capture_output=True, text=True
    )
    assert 'pip install "transformers>=5.17,<6"' in done.stdout, done.stderr


# --- rings that grow ------------------------------------------------------------------------------


def exact_of(model, window=900):
    return ctx.hf.CompressiveCache(model.config, window=window, compressed=0)


def long_llama(attention="ctx"):
    model = model_of("llama", attention)
    model.config.max_position_embeddings = 2048
    return model


@pytest.mark.parametrize("attention", ["ctx", "sdpa"])
@pytest.mark.parametrize("cut", [1, 50, 333, 700])
def test_exact_rings_grow_by_doubling(attention, cut):
    model, plain = long_llama(attention), long_llama("sdpa")
    x = tokens(2, 700)
    cache, sizes = exact_of(model), []
    parts = [x[:, :250], *x[:, 250:].split(cut, 1)] if cut < 700 else [x]
    got = []
    for part in parts:
        got.append(logits_of(model, cache, part))
        if not sizes or cache.nbytes != sizes[-1]:
            sizes.append(cache.nbytes)
    wanted = logits_of(plain, full_cache(plain), x)
    torch.testing.assert_close(torch.cat(got, 1), wanted, rtol=0, atol=1e-4)
    assert cache.memory.spec.layers[0].window in (512, 583, 700, 900)
    assert len(sizes) <= 4 and sizes == sorted(sizes)
    largest = exact_of(model)
    logits_of(model, largest, tokens(2, 900))
    assert cache.nbytes <= largest.nbytes


def test_window_ends_where_it_was_asked_to():
    """Beyond the window that was asked for nothing grows, and the law is the window's."""
    model = long_llama()
    x = tokens(1, 800)
    grown = ctx.hf.CompressiveCache(model.config, window=600, compressed=0, sinks=2)
    whole = ctx.hf.CompressiveCache(model.config, window=600, compressed=0, sinks=2)
    torch.testing.assert_close(
        logits_of(model, grown, x, 37), logits_of(model, whole, x), rtol=0, atol=2e-5
    )
    assert grown.memory.spec == whole.memory.spec and grown.nbytes == whole.nbytes
    assert grown.memory.spec.layers[0].window == 600


def test_grown_caches_fork_save_load_and_crop(tmp_path):
    model = long_llama()
    x = tokens(1, 600)
    cache = exact_of(model)
    logits_of(model, cache, x[:, :240])
    fork, small = cache.fork(), cache.nbytes
    logits_of(model, cache, x[:, 240:500])
    assert fork.nbytes == small < cache.nbytes
    cache.save(tmp_path / "cache")
    wanted = logits_of(model, cache, x[:, 500:])
    loaded = exact_of(model)
    loaded.load(tmp_path / "cache")
    assert torch.equal(logits_of(model, loaded, x[:, 500:]), wanted)
    with pytest.raises(ValueError, match="window"):  # of a smaller one
        exact_of(model, 300).load(tmp_path / "cache")
    logits_of(model, fork, x[:, 240:500])
    loaded.load_state_dict(fork.state_dict())
    assert torch.equal(logits_of(model, loaded, x[:, 500:]), wanted)
    cache.crop(-50)  # and what was taken back may come again
    cache.crop(-14)
    again = logits_of(model, cache, x[:, 536:])
    torch.testing.assert_close(again, wanted[:, 36:], rtol=0, atol=2e-5)
    cache.reset()
    torch.testing.assert_close(logits_of(model, cache, x)[:, 500:], wanted, rtol=0, atol=2e-5)


def test_what_left_a_smaller_window_is_not_taken_for_a_beginning():
    model = long_llama()
    x = tokens(1, 700)
    short = exact_of(model, 300)
    logits_of(model, short, x[:, :290])
    cache = exact_of(model)
    cache.load_state_dict(short.state_dict())  # all tokens are there
    torch.testing.assert_close(
        logits_of(model, cache, x[:, 290:]),
        logits_of(model, exact_of(model), x)[:, 290:],
        rtol=0,
        atol=2e-5,
    )
    logits_of(model, short, x[:, 290:])
    with pytest.raises(ValueError, match="window"):
        exact_of(model).load_state_dict(short.state_dict())


def test_rings_of_most_used_do_not_grow():
    model = long_llama()
    x = tokens(1, 400)
    cache = ctx.hf.CompressiveCache(model.config, window=500, compressed=0, compressor="most_used")
    torch.testing.assert_close(
        logits_of(model, cache, x, 150), logits_of(model, exact_of(model), x), rtol=0, atol=2e-5
    )


def test_padded_rows_grow():
    model, plain = long_llama(), long_llama("sdpa")
    x, mask = left_padded(tokens(2, 400), 0, 150)
    got = logits_of(model, exact_of(model), x, 180, mask)
    wanted = logits_of(plain, full_cache(plain), x, None, mask)
    seen = mask.bool()
    torch.testing.assert_close(got[seen], wanted[seen], rtol=0, atol=1e-4)


# --- sink logits (gpt-oss) ------------------------------------------------------------------------


def test_sink_logits_take_their_share():
    """Full and sliding layers, in one call and in pieces, padded rows: as transformers' eager."""
    ours, theirs = (model_of("gpt_oss", attention) for attention in ("ctx", "eager"))
    x, mask = left_padded(tokens(2, 40), 0, 9)
    wanted = logits_of(theirs, full_cache(theirs), x, None, mask)
    for cut in (None, 7, 1):
        got = logits_of(ours, exact_cache(ours), x, cut, mask)
        torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=0, atol=1e-4)
    assert (
        logits_of(ours, exact_cache(ours), x[:1])
        - logits_of(without_sinks(ours), exact_cache(ours), x[:1])
    ).abs().max() > 1e-2  # they matter


def without_sinks(model):
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-1e9)
    return model


@pytest.mark.parametrize("compressor", ["mean", "gated", "conv"])
@pytest.mark.parametrize("distance", ["slot", "token"])
def test_sink_logits_over_slots(compressor, distance):
    """Any cutting gives the same; logits of minus infinity are none at all."""
    model = model_of("gpt_oss")
    x = tokens(1, 70)

    def made():
        return small_cache(model, compressor=compressor, distance=distance)

    wanted = logits_of(model, made(), x)
    for cut in (1, 6, 33):
        torch.testing.assert_close(logits_of(model, made(), x, cut), wanted, rtol=0, atol=2e-5)
    silent = without_sinks(model)
    with_them = logits_of(silent, made(), x)
    for layer in silent.model.layers:
        layer.self_attn.sinks = None
    torch.testing.assert_close(logits_of(silent, made(), x), with_them, rtol=0, atol=2e-5)


def test_sink_logits_refuse_what_depends_on_the_cutting():
    model = model_of("gpt_oss")
    for options, said in (
        ({"compressor": "most_used"}, "compressor must not be 'most_used'"),
        ({"compressed_dtype": torch.int8}, "compressed_dtype must be that of the pairs"),
    ):
        cache = small_cache(model, **options)
        with pytest.raises(ValueError, match=said):
            logits_of(model, cache, tokens(1, 9))
        assert int(cache.memory.seen) == 0
