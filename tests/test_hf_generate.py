"""`generate` of Hugging Face models with ctx.hf: every way of decoding gives what the law says."""

import pytest
import torch

import ctx.hf
from hf_models import (
    exact_cache,
    full_cache,
    generated,
    left_padded,
    logits_of,
    model_of,
    small_cache,
    tokens,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated"),
    pytest.mark.filterwarnings("ignore:The attention mask"),
]

ATTENTIONS = ["sdpa", "eager", "ctx"]
SIX = ["llama", "qwen2", "mistral", "gpt_neox", "gemma", "phi"]


def by_hand(model, cache, x, count=12):
    """Greedy, one token at a time, by forward calls alone."""
    out = x
    logits = logits_of(model, cache, x)
    for _ in range(count):
        out = torch.cat([out, logits[:, -1:].argmax(-1)], 1)
        logits = logits_of(model, cache, out[:, -1:])
    return out


# --- nothing evicted ------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", SIX)
def test_greedy_as_dynamic_cache(family, attention):
    ours = model_of(family, attention)
    theirs = model_of(family, "sdpa" if attention == "ctx" else attention)
    x, mask = left_padded(tokens(2, 20), 0, 8)
    for prompt, options in ((x[:1], {}), (x, {"attention_mask": mask})):
        wanted = generated(theirs, full_cache(theirs), prompt, **options)
        assert torch.equal(generated(ours, exact_cache(ours), prompt, **options), wanted)


def test_gemma2_with_its_soft_cap_and_sliding_layers():
    ours, theirs = model_of("gemma2"), model_of("gemma2", "eager")
    x, mask = left_padded(tokens(2, 20), 0, 8)
    wanted = generated(theirs, full_cache(theirs), x, attention_mask=mask)
    assert torch.equal(generated(ours, exact_cache(ours), x, attention_mask=mask), wanted)
    assert torch.equal(generated(theirs, exact_cache(theirs), x, attention_mask=mask), wanted)


def test_prompt_of_a_cached_beginning():
    """A prompt that the cache has partly seen: generate feeds what is new."""
    model = model_of("llama")
    x = tokens(1, 50)
    for make in (exact_cache, small_cache):
        cache = make(model)
        logits_of(model, cache, x[:, :30])
        assert torch.equal(generated(model, cache, x), by_hand(model, make(model), x))


# --- compressing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["slot", "token"])
@pytest.mark.parametrize("family", [*SIX, "gemma2", "yarn"])
def test_prefill_chunks(family, distance):
    model = model_of(family)
    x = tokens(1, 70)
    wanted = by_hand(model, small_cache(model, distance=distance), x)
    for chunk in (None, 1, 7, 64):
        options = {} if chunk is None else {"prefill_chunk_size": chunk}
        got = generated(model, small_cache(model, distance=distance), x, **options)
        assert torch.equal(got, wanted), chunk


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_chunks_of_a_segment_without_the_attention(attention):
    model = model_of("llama")
    x, options = tokens(1, 70), {"segment": 16, "slot_mass": False}
    wanted = generated(model, small_cache(model, **options), x)
    model.set_attn_implementation(attention)
    got = generated(model, small_cache(model, **options), x, prefill_chunk_size=16)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_padded_rows_generate_as_rows_alone(family):
    model = model_of(family)
    x, mask = left_padded(tokens(3, 40), 0, 11, 30)
    for options in ({}, {"prefill_chunk_size": 9}):
        got = generated(model, small_cache(model), x, attention_mask=mask, **options)
        for row, count in enumerate(mask.sum(1).tolist()):
            alone = generated(model, small_cache(model), x[row : row + 1, 40 - count :])
            assert torch.equal(got[row, 40:], alone[0, count:])


@pytest.mark.parametrize("attention", ["ctx", "sdpa"])
def test_prompt_lookup_is_greedy(attention):
    model = model_of("llama", attention)
    x = tokens(1, 10).repeat(1, 3)
    options = {"segment": 64, "slot_mass": False} if attention == "sdpa" else {}
    wanted = generated(model, small_cache(model, **options), x, 20)
    got = generated(model, small_cache(model, **options), x, 20, prompt_lookup_num_tokens=5)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_assisted_decoding_is_greedy(family):
    model, assistant = model_of(family), model_of(family)
    with torch.no_grad():  # agrees now and then
        for parameter in assistant.parameters():
            parameter.add_(0.1 * parameter.abs().mean() * torch.randn_like(parameter))
    x = tokens(1, 40)
    wanted = generated(model, small_cache(model), x, 40)
    cache = small_cache(model)
    got = generated(model, cache, x, 40, assistant_model=assistant)
    assert torch.equal(got, wanted)
    assert cache.memory.seen.tolist() == [79]


def test_usage_cannot_be_taken_back():
    model = model_of("llama")
    cache = small_cache(model, compressor="most_used")
    assert not cache.is_croppable and small_cache(model).is_croppable
    with pytest.raises(ValueError, match=r"can be cropped|most_used"):
        generated(model, cache, tokens(1, 40), prompt_lookup_num_tokens=5)
    with pytest.raises(ValueError, match="most_used"):
        cache.crop(-1)


def beams_of(model, x, beams, count, make):
    """Beam search by the book: every beam read anew into a cache of its own."""
    kept = [(0.0, x)]
    for _ in range(count):
        grown = []
        for score, text in kept:
            scores = logits_of(model, make(model), text)[0, -1].float().log_softmax(-1)
            top = scores.topk(beams)
            for value, token in zip(*map(torch.Tensor.tolist, top), strict=True):
                grown.append((score + value, torch.cat([text, torch.tensor([[token]])], 1)))
        kept = sorted(grown, key=lambda pair: -pair[0])[:beams]
    return kept[0][1]


def test_beam_search_is_beam_search(monkeypatch):
    model, theirs = model_of("llama"), model_of("llama", "sdpa")
    for one in (model, theirs):  # nearly uniform: beams overtake each other
        one.lm_head.weight.data.mul_(0.05)
    orders = []
    reorder = ctx.hf.CompressiveCache.reorder_cache

    def noting(self, beam_idx):
        orders.append(beam_idx.tolist())
        reorder(self, beam_idx)

    monkeypatch.setattr(ctx.hf.CompressiveCache, "reorder_cache", noting)
    for seed in range(3):
        x = tokens(1, 30, seed)
        got = generated(model, small_cache(model), x, 9, num_beams=3)
        assert torch.equal(got, beams_of(model, x, 3, 9, small_cache))
        for attention in ATTENTIONS:
            model.set_attn_implementation(attention)
            got = generated(model, exact_cache(model), x, 9, num_beams=3)
            assert torch.equal(got, generated(theirs, full_cache(theirs), x, 9, num_beams=3))
        model.set_attn_implementation("ctx")
    assert sum(len(set(order)) > 1 and order != [0, 1, 2] for order in orders) > 10


def test_rows_are_repeated_and_selected():
    model = model_of("gemma2")
    x = tokens(3, 40)
    cache = small_cache(model)
    logits_of(model, cache, x)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert cache.memory.batch_size == cache.batch_size == 2
    late = tokens(2, 9, seed=4)
    got = logits_of(model, cache, late)
    for row, source in enumerate((2, 0)):
        text = torch.cat([x[source : source + 1], late[row : row + 1]], 1)
        wanted = logits_of(model, small_cache(model), text)[:, 40:]
        torch.testing.assert_close(got[row : row + 1], wanted, atol=1e-4, rtol=0)


def test_sampling_several_sequences():
    model = model_of("llama")
    x = tokens(1, 30)
    torch.manual_seed(3)
    got = generated(model, small_cache(model), x, do_sample=True, num_return_sequences=3)
    torch.manual_seed(3)
    wanted = generated(model, small_cache(model), x.repeat(3, 1), do_sample=True)
    assert torch.equal(got, wanted)


def test_conversations_go_on_over_several_calls():
    model = model_of("llama")
    x = tokens(1, 30)
    cache = small_cache(model)
    text = generated(model, cache, x)
    text = torch.cat([text, tokens(1, 25, seed=5)], 1)
    got = generated(model, cache, text)
    assert torch.equal(got, by_hand(model, small_cache(model), text))


def test_batches_go_on_over_several_calls():
    model = model_of("llama")
    x, mask = left_padded(tokens(2, 30), 0, 9)
    cache = small_cache(model)
    text = generated(model, cache, x, attention_mask=mask)
    mask = torch.cat([mask, torch.ones(2, 12, dtype=mask.dtype)], 1)
    late, late_mask = left_padded(tokens(2, 15, seed=5), 6, 0)
    text, mask = torch.cat([text, late], 1), torch.cat([mask, late_mask], 1)
    got = generated(model, cache, text, attention_mask=mask)
    for row in range(2):
        alone = text[row : row + 1, mask[row].bool()]
        wanted = generated(model, small_cache(model), alone)
        assert torch.equal(got[row, text.shape[1] :], wanted[0, alone.shape[1] :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_is_prefill(dtype):
    """Logits of tokens that were decoded one by one are those of the text read at once."""
    model = model_of("llama", dtype=dtype)
    x = tokens(1, 30)
    made = model.generate(
        x, past_key_values=small_cache(model), max_new_tokens=20, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    whole = logits_of(model, small_cache(model), made.sequences)[:, 29:-1].float()
    got = torch.stack(made.logits, 1).float()
    error = 1e-4 if dtype == torch.float32 else 0.1 * whole.abs().max().item()
    assert (got - whole).abs().max() <= error
